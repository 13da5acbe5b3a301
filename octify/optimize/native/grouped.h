// Convolutions of small groups, as many channels out of each as into it: depthwise, and groups that vectors hold whole.
//
// A vector of channels, some pixels of a row: each input is read once for all the outputs and taps that meet in it, and
// each of its group's channels is spread over the group, so that no product is made that is not needed.

#pragma once

#include "maps.h"

constexpr int ALONG = 8;               // output pixels of a row at once
constexpr int64_t WEIGHTS = 4 << 10;  // bytes of weights that pixels are run through together: they leave room for maps
constexpr int64_t BAND = 8;            // rows that a column of pixels runs down, so that each input comes from afar once

// Of every `G` lanes, lane `J` in all of them.
template <int G, int J, int... LANE>
static inline vec spread(vec x, std::integer_sequence<int, LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, x, (LANE / G * G + J)...);
#else
  return __builtin_shuffle(x, (ivec){(LANE / G * G + J)...});
#endif
}

template <int G, int... J>
static inline void spread_all(vec x, vec (&to)[G], std::integer_sequence<int, J...>) {
  if (G == 1) to[0] = x;
  else ((to[J] = spread<G, J>(x, std::make_integer_sequence<int, LANES>())), ...);
}

// A convolution that takes part in a step, and where it reads: the columns of output `column` begin at `left`.
struct Reader {
  const Conv* conv;
  const Map* x;
  const float* const* lines;  // per row of the kernel, its line of the input; none beyond the borders
  int64_t left;
};

// Adds a convolution's products; `valid` channels of the vector are there, INSIDE all of them and all columns.
template <int G, int K, int S, bool INSIDE>
ALWAYS_INLINE void add_known(const Reader& from, int64_t channel, int64_t valid, vec (&sum)[ALONG][1]) {
  constexpr int COLUMNS = (ALONG - 1) * S + K;
  const Conv& conv = *from.conv;
  const int64_t pitch = from.x->pitch, channels = (from.x->c + WIDE - 1) / WIDE * WIDE;
  for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
    if (!from.lines[kh]) continue;
    const float* weight = conv.weight + kh * K * G * channels + channel;
    vec row[K][G];
#pragma GCC unroll 8
    for (int kw = 0; kw < K; ++kw)
#pragma GCC unroll 8
      for (int j = 0; j < G; ++j) row[kw][j] = load(weight + (kw * G + j) * channels);
    const float* x = from.lines[kh] + from.left * pitch + channel;
#pragma GCC unroll 32
    for (int column = 0; column < COLUMNS; ++column, x += pitch) {
      vec value, each[G];
      if (INSIDE) {
        value = load(x);
      } else {
        const int64_t w = from.left + column;
        value = w < 0 || w >= from.x->w ? vec{} : valid >= LANES ? load(x) : load_some(x, valid);
      }
      hold(value);
      spread_all(value, each, std::make_integer_sequence<int, G>());
#pragma GCC unroll 8
      for (int kw = 0; kw < K; ++kw)
        if (column >= kw && (column - kw) % S == 0 && (column - kw) / S < ALONG)
#pragma GCC unroll 8
          for (int j = 0; j < G; ++j) sum[(column - kw) / S][0] += each[j] * row[kw][j];
    }
  }
}

// The same for any kernel, stride and dilation, and for `count` pixels only.
template <int G>
ALWAYS_INLINE void add_any(const Reader& from, int64_t channel, int count, int64_t valid, vec (&sum)[ALONG][1]) {
  const Conv& conv = *from.conv;
  const int64_t pitch = from.x->pitch, channels = (from.x->c + WIDE - 1) / WIDE * WIDE;
  for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
    if (!from.lines[kh]) continue;
    const float* weight = conv.weight + kh * conv.kernel[1] * G * channels + channel;
    for (int64_t kw = 0; kw < conv.kernel[1]; ++kw, weight += G * channels)
#pragma GCC unroll 8
      for (int m = 0; m < ALONG; ++m) {
        const int64_t w = from.left + m * conv.stride[1] + kw * conv.dilation[1];
        if (m >= count || w < 0 || w >= from.x->w) continue;
        const float* x = from.lines[kh] + w * pitch + channel;
        vec each[G];
        spread_all(valid >= LANES ? load(x) : load_some(x, valid), each, std::make_integer_sequence<int, G>());
        for (int j = 0; j < G; ++j) sum[m][0] += each[j] * load(weight + j * channels);
      }
  }
}

struct Readers {
  Reader of[4];
  int64_t count;
};

typedef void (*Along)(const Readers&, const Out&, int64_t pixel, int64_t channel, int count);

template <int G, int K, int S, bool INSIDE>
__attribute__((noinline)) static void run_along(const Readers& from, const Out& to, int64_t pixel, int64_t channel,
                                                int count) {
  const int64_t valid = to.channels - channel;
  vec sum[ALONG][1];
#pragma GCC unroll 8
  for (int m = 0; m < ALONG; ++m) sum[m][0] = load(to.bias + channel);
  for (int64_t i = 0; i < from.count; ++i) {
    if constexpr (K > 0) add_known<G, K, S, INSIDE>(from.of[i], channel, valid, sum);
    else add_any<G>(from.of[i], channel, count, valid, sum);
  }
  if (INSIDE) count = ALONG;
  finish(sum, to, pixel, channel, count);
}

// How to run convolutions of one geometry: within the borders, and anywhere.
struct Ways {
  Along inside, anywhere;
};

template <int G, int K, int S>
static Ways ways() {
  return {run_along<G, K, S, true>, run_along<G, K, S, false>};
}

template <int G>
static Ways ways_of(int64_t kernel, int64_t stride) {
  if (stride == 1) switch (kernel) {
      case 2: return ways<G, 2, 1>();
      case 3: return ways<G, 3, 1>();
      case 5: return ways<G, 5, 1>();
      case 7: return ways<G, 7, 1>();
    }
  if (stride == 2) switch (kernel) {
      case 3: return ways<G, 3, 2>();
      case 5: return ways<G, 5, 2>();
    }
  return {nullptr, run_along<G, 0, 0, false>};
}

static Ways ways_for(const Step& step) {
  const Conv& first = step.conv[0];
  int64_t kernel = first.kernel[1], stride = first.stride[1];
  for (int64_t i = 0; i < step.convs; ++i) {
    const Conv& conv = step.conv[i];
    if (conv.kernel[1] != kernel || conv.stride[1] != stride || conv.dilation[1] != 1) kernel = 0;
  }
  switch (first.span) {
    case 2: return ways_of<2>(kernel, stride);
    case 4: return ways_of<4>(kernel, stride);
    default: return ways_of<1>(kernel, stride);
  }
}

// Per row of the output from `top` to `end` (of one image, counted through all), the lines that a kernel reads.
static void find_lines(const Conv& conv, const Map& x, const Map& out, int64_t top, int64_t end,
                       std::vector<const float*>& lines) {
  lines.clear();
  for (int64_t row = top; row < end; ++row)
    for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
      const int64_t h = row % out.h * conv.stride[0] + kh * conv.dilation[0] - conv.before[0];
      lines.push_back(h >= 0 && h < x.h ? x.data + (row / out.h * x.h + h) * x.w * x.pitch : nullptr);
    }
}

static void run_grouped(const Step& step, const Map* maps, int threads) {
  const Map& out = maps[step.out];
  const Ways way = ways_for(step);
  Conv convs[4];
  int64_t taps = 0;
  for (int64_t i = 0; i < step.convs; ++i) {
    convs[i] = settled(step.conv[i], maps, out);
    taps += convs[i].kernel[0] * convs[i].kernel[1] * convs[i].span;
  }
  const int64_t together = std::max<int64_t>(1, WEIGHTS / (4 * LANES * taps)) * LANES;
  const int64_t tiles = (out.w + ALONG - 1) / ALONG;

  each_band_pooled(step, maps, BAND, threads, [&](int64_t top, int64_t end) {
    static thread_local std::vector<int64_t> low;
    static thread_local std::vector<const float*> lines[4];
    const Out to = out_of(step, maps, top * out.w, (end - top) * out.w, low);
    Readers from;
    from.count = step.convs;
    for (int64_t i = 0; i < step.convs; ++i) {
      from.of[i].conv = &convs[i], from.of[i].x = &maps[convs[i].input.map];
      find_lines(convs[i], *from.of[i].x, out, top, end, lines[i]);
    }
    for (int64_t block = 0; block < out.c; block += together)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        // The last tile of a row goes back as far as it must to be whole: some pixels are computed twice.
        const int64_t first = std::max<int64_t>(0, std::min(tile * ALONG, out.w - ALONG));
        const int64_t count = std::min<int64_t>(ALONG, out.w);
        bool inside = way.inside != nullptr && count == ALONG;
        for (int64_t i = 0; i < step.convs; ++i) {
          const Conv& conv = convs[i];
          const int64_t left = first * conv.stride[1] - conv.before[1];
          from.of[i].left = left;
          inside &= left >= 0 && left + (ALONG - 1) * conv.stride[1] + conv.kernel[1] <= maps[conv.input.map].w;
        }
        for (int64_t row = 0; row < end - top; ++row) {
          for (int64_t i = 0; i < step.convs; ++i) from.of[i].lines = lines[i].data() + row * convs[i].kernel[0];
          for (int64_t c = block; c < std::min(block + together, out.c); c += LANES)
            (inside && c + LANES <= out.c ? way.inside : way.anywhere)(from, to, row * out.w + first, c, count);
        }
      }
  });
}
