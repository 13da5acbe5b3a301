// Full convolutions, and those of large groups: sums of matrix products, panel by panel and tile by tile.

#pragma once

#include "inputs.h"

constexpr int NARROW = 12;            // pixels in a tile of one vector, as where a last panel has no more channels
constexpr int64_t CACHE = 256 << 10;  // bytes of input that a block of pixels may take

// What a tile of a sum step reads and writes: pixels from `pixel` on, one after the other.
struct Source {
  const float* const* rows;  // per tap, the input of every pixel of the block
  const float* weight;
  int64_t taps, span, first;
  const char* ahead;  // the part of the next panel that this tile fetches, and how much of it for each channel
  int64_t share;
};

struct Tile {
  const Source* sources;
  int64_t count, block;  // sources; pixels in the block
  Out to;
};

template <int PIXELS, int VECTORS>
__attribute__((noinline)) static void run_tile(const Tile& tile, int64_t pixel, int64_t channel) {
  fetch(tile.to, pixel, channel, PIXELS, VECTORS);
  vec sum[PIXELS][VECTORS];
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) sum[m][i] = load(tile.to.bias + channel + i * LANES);
  for (int64_t s = 0; s < tile.count; ++s) {
    const Source& source = tile.sources[s];
    const float* weight = source.weight;
    const float* const* rows = source.rows + pixel;
    const char* ahead = source.ahead;
    for (int64_t tap = 0; tap < source.taps; ++tap, rows += tile.block) {
      const float* x[PIXELS];
#pragma GCC unroll 16
      for (int m = 0; m < PIXELS; ++m) x[m] = rows[m] + source.first;
      for (int64_t c = 0; c < source.span; ++c, weight += VECTORS * LANES) {
        vec row[VECTORS];
#pragma GCC unroll 2
        for (int i = 0; i < VECTORS; ++i) row[i] = *(const vec*)(weight + i * LANES);
        if (VECTORS > 1) __builtin_prefetch(ahead, 0, 2), ahead += source.share;  // loads are what a narrow tile lacks
#pragma GCC unroll 16
        for (int m = 0; m < PIXELS; ++m) {
          const vec value = all(x[m][c]);
#pragma GCC unroll 2
          for (int i = 0; i < VECTORS; ++i) sum[m][i] += value * row[i];
        }
      }
    }
  }
  finish(sum, tile.to, pixel, channel, PIXELS);
}

typedef void (*Run)(const Tile&, int64_t, int64_t);
template <int VECTORS, class Numbers>
struct Runs;
template <int VECTORS, int... NUMBER>
struct Runs<VECTORS, std::integer_sequence<int, NUMBER...>> {
  Run of[sizeof...(NUMBER)] = {run_tile<NUMBER + 1, VECTORS>...};
};
static const Runs<1, std::make_integer_sequence<int, NARROW>> NARROWS;
static const Runs<2, std::make_integer_sequence<int, MOST>> WIDES;

// Per tap, where each of some output pixels finds its input where beyond the borders the edge is repeated.
static void find_clamped(const Conv& conv, const Map& x, const Map& out, int64_t from, int64_t count, int64_t pitch,
                         const float** rows) {
  each_row(out, from, count, [&](int64_t i, int64_t n, int64_t oh, int64_t column, int64_t columns) {
    const float** to = rows + i;
    for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
      const int64_t h = oh * conv.stride[0] + kh * conv.dilation[0] - conv.before[0];
      const float* line = x.data + (n * x.h + std::clamp<int64_t>(h, 0, x.h - 1)) * x.w * x.pitch;
      for (int64_t kw = 0; kw < conv.kernel[1]; ++kw, to += pitch)
        for (int64_t j = 0; j < columns; ++j) {
          const int64_t w = (column + j) * conv.stride[1] + kw * conv.dilation[1] - conv.before[1];
          to[j] = line + std::clamp<int64_t>(w, 0, x.w - 1) * x.pitch;
        }
    }
  });
}

// Per tap, where each of some output pixels (counted through all images) finds its input; zeros beyond the borders.
static void find_rows(const Conv& conv, const Map& x, const Map& out, int64_t from, int64_t count, int64_t pitch,
                      const float* zeros, const float** rows) {
  if (conv.edge) return find_clamped(conv, x, out, from, count, pitch, rows);
  const int64_t step = conv.stride[1] * x.pitch;
  each_row(out, from, count, [&](int64_t i, int64_t n, int64_t oh, int64_t column, int64_t columns) {
    const float** to = rows + i;
    for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
      const int64_t h = oh * conv.stride[0] + kh * conv.dilation[0] - conv.before[0];
      const float* line = x.data + (n * x.h + h) * x.w * x.pitch;
      const bool beyond = h < 0 || h >= x.h;
      for (int64_t kw = 0; kw < conv.kernel[1]; ++kw, to += pitch) {
        const int64_t shift = kw * conv.dilation[1] - conv.before[1];  // w = column · stride + shift
        int64_t j = 0, w = column * conv.stride[1] + shift;
        const int64_t last = beyond ? 0 : std::min(columns, (x.w - 1 - w + conv.stride[1]) / conv.stride[1]);
        for (; j < last && w < 0; ++j, w += conv.stride[1]) to[j] = zeros;
        const float* place = line + w * x.pitch;
        for (; j < last; ++j, place += step) to[j] = place;
        for (; j < columns; ++j) to[j] = zeros;
      }
    }
  });
}

constexpr int64_t FEW = 4;  // channels of a map whose neighbours along a row are read as one run

// A convolution of few channels (of an image) as one of a kernel one wide: along a row of a map with zeros at its ends,
// what a kernel's row reads is one run of numbers, and so is its weight.
static void join_columns(Conv& conv, Map& x, const Map& out, std::vector<float>& room) {
  if (x.c > FEW || conv.edge || conv.span != x.c || conv.kernel[1] == 1 || conv.dilation[1] != 1) return;
  const int64_t reach = (out.w - 1) * conv.stride[1] + conv.kernel[1], left = conv.before[1];
  const int64_t wide = std::max(reach, left + x.w);
  room.assign(x.n * x.h * wide * x.c, 0.f);
  const int64_t runs = x.pitch == x.c ? 1 : x.w, length = x.w / runs;  // of a row, what lies in one piece
  for (int64_t row = 0; row < x.n * x.h; ++row)
    for (int64_t w = 0; w < x.w; w += length)
      std::copy_n(x.data + (row * x.w + w) * x.pitch, length * x.c, room.data() + (row * wide + left + w) * x.c);
  conv.span *= conv.kernel[1], conv.kernel[1] = 1, conv.before[1] = 0;
  x = {room.data(), x.n, x.h, wide, x.c, x.c};
}

// Weights come from far: while one panel is used, the next is fetched, at the end that of the step that follows.
struct Ahead {
  const float* weights;
  int64_t bytes;
};

// The rows of a panel of a step's weights, of all its convolutions.
static int64_t rows_of_panel(const Step& step) {
  int64_t rows = 0;
  for (int64_t i = 0; i < step.convs; ++i) rows += step.conv[i].kernel[0] * step.conv[i].kernel[1] * step.conv[i].span;
  return rows;
}

// The first panel of the first step from `step` on that has weights in panels.
static Ahead first_panel(const Step* step, const Step* end) {
  while (step < end && (step->kind != SUM || !step->convs)) ++step;
  if (step == end) return {nullptr, 0};
  return {step->weights, 4 * rows_of_panel(*step) * step->panel->width};
}

// Sums without products: pixel by pixel, so that no memory is passed over in strips.
static void run_plain(const Tile& tile, int64_t count) {
  for (int64_t pixel = 0; pixel < count; pixel += MOST) {
    const int64_t here = std::min<int64_t>(MOST, count - pixel);
    for (int64_t c = 0; c < tile.to.channels; c += WIDE) WIDES.of[here - 1](tile, pixel, c);
  }
}

static void run_sum(const Step& step, Ahead following, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  static thread_local std::vector<float> rooms[4];
  Conv convs[4];
  Map inputs[4];
  for (int64_t i = 0; i < step.convs; ++i) {
    convs[i] = settled(step.conv[i], maps, out), inputs[i] = map_of(convs[i].input, maps);
    if (inputs[i].data) join_columns(convs[i], inputs[i], out, rooms[i]);
  }
  const int64_t image = out.h * out.w, pixels = out.n * image, panels = std::max<int64_t>(1, step.panels);
  int64_t bytes = 4 * out.c, rows = 0;
  const int64_t total = rows_of_panel(step);
  for (int64_t i = 0; i < step.convs; ++i) {
    const Conv& conv = convs[i];
    bytes += 4 * inputs[i].c * conv.stride[0] * conv.stride[1] * (inputs[i].data ? 1 : 2);
    rows += conv.kernel[0] * conv.kernel[1];
  }
  const int64_t block = std::max<int64_t>(8 * MOST, std::min<int64_t>(CACHE / bytes, 84 * MOST));
  // Blocks of pixels; where the result is pooled, of whole pairs of rows of one image.
  std::vector<int64_t> starts;
  const int64_t unit = step.pooled >= 0 ? 2 * out.w : 1, region = step.pooled >= 0 ? image : pixels;
  for (int64_t base = 0; base < pixels; base += region) {
    const int64_t units = (region + unit - 1) / unit, each = std::max<int64_t>(1, block / unit);
    const int64_t count = (units + each - 1) / each;
    for (int64_t i = 0; i < count; ++i) starts.push_back(base + units * i / count * unit);
  }
  const int64_t blocks = starts.size();
  starts.push_back(pixels);
  const int64_t parts = threads > 1 ? std::min(panels, (4 * threads + blocks - 1) / blocks) : 1;

#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < blocks * parts; ++task) {
    const int64_t which = task / parts, part = task % parts;
    const int64_t from = starts[which], count = std::min(starts[which + 1], pixels) - from;
    static thread_local std::vector<const float*> found;
    static thread_local std::vector<int64_t> low;
    static thread_local std::vector<float> filled[4];
    found.resize(rows * count);
    Source sources[4];
    int64_t used = 0;
    for (int64_t i = 0; i < step.convs; ++i) {
      const Conv& conv = convs[i];
      sources[i] = {found.data() + used, nullptr, conv.kernel[0] * conv.kernel[1], conv.span, 0, nullptr, 0};
      if (inputs[i].data) {
        find_rows(conv, inputs[i], out, from, count, count, zeros, found.data() + used);
      } else {  // of one tap: what it reads is made pixel by pixel, while it is near
        filled[i].resize(count * inputs[i].c);
        fill(conv.input, maps, from, count, filled[i].data(), inputs[i].c);
        for (int64_t j = 0; j < count; ++j) found[used + j] = filled[i].data() + j * inputs[i].c;
      }
      used += sources[i].taps * count;
    }
    Tile tile{sources, step.convs, count, out_of(step, maps, from, count, low)};
    if (!step.panels) run_plain(tile, count);
    for (int64_t index = panels * part / parts; step.panels && index < panels * (part + 1) / parts; ++index) {
      const Panel& panel = step.panel[index];
      const bool narrow = panel.width == LANES;
      const int64_t most = narrow ? NARROW : MOST, tiles = (count + most - 1) / most;
      const Run* runs = narrow ? NARROWS.of : WIDES.of;
      const float* weights = step.weights + panel.begin * total;
      Ahead next{weights + total * panel.width, 0};
      if (index + 1 < panels) next.bytes = 4 * total * step.panel[index + 1].width;
      else if (which == blocks - 1) next = following;
      const int64_t share = std::min<int64_t>(64, (next.bytes + total * tiles - 1) / std::max<int64_t>(1, total * tiles));
      tile.to.end = panel.first + panel.outputs;
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = count * i / tiles, last = count * (i + 1) / tiles;
        for (int64_t j = 0, row = 0; j < step.convs; row += sources[j].taps * sources[j].span, ++j) {
          sources[j].weight = weights + row * panel.width, sources[j].first = convs[j].first[index];
          sources[j].ahead = (const char*)next.weights + (i * total + row) * share, sources[j].share = share;
        }
        runs[last - first - 1](tile, first, panel.first);
      }
    }
    if (step.pooled >= 0 && parts == 1) {
      const int64_t n = from / image, top = from % image / out.w, end = top + count / out.w;
      pool_rows(out, maps[step.pooled], n, top / 2, (end + 1) / 2);
    }
  }
  if (step.pooled >= 0 && parts > 1)
    for (int64_t n = 0; n < out.n; ++n) pool_rows(out, maps[step.pooled], n, 0, (out.h + 1) / 2);
}
