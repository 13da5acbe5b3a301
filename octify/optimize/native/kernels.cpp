// An optimised network's layers on a CPU: float32 maps (N, H, W, C), a list of steps run by one call.
//
// A sum step computes act(Σ conv(x) + bias + Σ plain + up(low)) with everything behind the products done on
// accumulators in registers, and pools its result by 2×2 on the way if somebody reads that: the four paths of an
// octave convolution are two such steps and a low one, none of which passes over a map twice.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 12;  // floats in a vector; pixels in a tile, as many as registers hold
#elif defined(__AVX__)
constexpr int LANES = 8, MOST = 6;
#else
constexpr int LANES = 4, MOST = 6;
#endif
constexpr int WIDE = 2 * LANES;         // output channels in a panel of weights
constexpr int NARROW = 12;              // pixels in a tile of one vector, as where a last panel has no more channels
constexpr int64_t CACHE = 256 << 10;    // bytes of input that a block of pixels may take

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));

enum Kind { SUM = 0, DEPTHWISE = 1, POOL = 2, AFFINE = 3, COPY = 4, GREATEST = 5 };
enum Act { NONE = 0, RELU = 1, RELU6 = 2, SILU = 3, HARDSWISH = 4, SIGMOID = 5, TANH = 6 };

struct Map {
  float* data;
  int64_t n, h, w, c;
};

struct Conv {
  int64_t map;           // what it reads
  const float* weight;   // SUM: [panel][tap][channel][wide], a narrow last panel [LANES]; DEPTHWISE: [tap][channel]
  const int64_t* first;  // the first channel that each panel reads
  int64_t span;          // how many channels a panel reads
  int64_t kernel[2], stride[2], before[2], dilation[2];
};

struct Step {
  int64_t kind, out, pooled, act, convs, plains, up;  // pooled and up: a map or -1
  int64_t wide;        // SUM: output channels in a panel, WIDE or LANES
  int64_t plain[4];
  int64_t offset;      // COPY, AFFINE: where its channels begin in the output
  const float* scale;  // AFFINE
  const float* bias;   // padded to a multiple of WIDE
  Conv conv[4];
};

static inline vec load(const float* p) { return *(const loose*)p; }
static inline void store(float* p, vec v) { *(loose*)p = v; }
static inline vec all(float x) { return x - (vec){}; }
static inline vec least(vec a, vec b) { return b < a ? b : a; }
static inline vec most(vec a, vec b) { return a < b ? b : a; }  // a where a is not a number

static inline vec exponential(vec x) {  // to 2 units in the last place; Cephes' polynomial
  x = least(most(x, all(-87.f)), all(88.f));
  const vec magic = all(12582912.f);
  vec n = x * all(1.44269504f) + magic - magic;
  vec r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
  vec p = all(1.9875691500e-4f);
  p = p * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  p = p * r * r + r + all(1.f);
  ivec bits = (__builtin_convertvector(n, ivec) + 127) << 23;
  return p * (vec)bits;
}

static inline vec activate(vec x, int64_t act) {
  switch (act) {
    case RELU: return most(x, all(0.f));
    case RELU6: return least(most(x, all(0.f)), all(6.f));
    case SILU: return x / (all(1.f) + exponential(-x));
    case HARDSWISH: return x * least(most(x + all(3.f), all(0.f)), all(6.f)) / all(6.f);
    case SIGMOID: return all(1.f) / (all(1.f) + exponential(-x));
    case TANH: return all(2.f) / (all(1.f) + exponential(all(-2.f) * x)) - all(1.f);
    default: return x;
  }
}

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
  const float* bias;
  const float* plain[4];
  int64_t plains;
  const float* up;
  const int64_t* low;  // per pixel of the block, its place in `up`
  float* out;
  int64_t channels, act;
};

// The first `valid` numbers of a vector, fewer than it holds; what lies beyond them is neither read nor written.
#if defined(__AVX512F__)
static inline vec load_some(const float* p, int64_t valid) {
  return (vec)_mm512_maskz_loadu_ps((__mmask16)((1u << valid) - 1), p);
}
static inline void store_some(float* p, vec v, int64_t valid) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << valid) - 1), (__m512)v);
}
#elif defined(__AVX__)
static inline __m256i first(int64_t valid) {
  const ivec lanes = {0, 1, 2, 3, 4, 5, 6, 7}, end = (ivec){} + (int32_t)valid;
  return (__m256i)(lanes < end);
}
static inline vec load_some(const float* p, int64_t valid) { return (vec)_mm256_maskload_ps(p, first(valid)); }
static inline void store_some(float* p, vec v, int64_t valid) { _mm256_maskstore_ps(p, first(valid), (__m256)v); }
#else
static inline vec load_some(const float* p, int64_t valid) {
  float all_lanes[LANES] = {};
  std::copy_n(p, valid, all_lanes);
  return load(all_lanes);
}
static inline void store_some(float* p, vec v, int64_t valid) {
  float all_lanes[LANES];
  store(all_lanes, v);
  std::copy_n(all_lanes, valid, p);
}
#endif

// Calls visit(channel, load, store) for the vectors that some channels make up, the last one perhaps not whole.
template <class Visit>
static inline void each_vector(int64_t channels, Visit visit) {
  int64_t c = 0;
  for (; c + LANES <= channels; c += LANES) visit(c, load, store);
  if (const int64_t rest = channels - c)
    visit(c, [=](const float* p) { return load_some(p, rest); }, [=](float* p, vec v) { store_some(p, v, rest); });
}

template <int PIXELS, int VECTORS>
__attribute__((noinline)) static void run_tile(const Tile& tile, int64_t pixel, int64_t channel) {
  vec sum[PIXELS][VECTORS];
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) sum[m][i] = load(tile.bias + channel + i * LANES);
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
  const int64_t valid = tile.channels - channel;
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m) {
    const int64_t place = (pixel + m) * tile.channels + channel;
    const int64_t low = tile.up ? tile.low[pixel + m] * tile.channels + channel : 0;
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) {
      const int64_t at = i * LANES, left = valid - at;
      vec v = sum[m][i];
      if (left >= LANES) {
        for (int64_t p = 0; p < tile.plains; ++p) v += load(tile.plain[p] + place + at);
        if (tile.up) v += load(tile.up + low + at);
        store(tile.out + place + at, activate(v, tile.act));
      } else if (left > 0) {
        for (int64_t p = 0; p < tile.plains; ++p) v += load_some(tile.plain[p] + place + at, left);
        if (tile.up) v += load_some(tile.up + low + at, left);
        store_some(tile.out + place + at, activate(v, tile.act), left);
      }
    }
  }
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

// The average of 2×2 positions of the rows 2·from … 2·to - 1 of an image; at an odd border of fewer.
static void pool_rows(const Map& x, const Map& out, int64_t image, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; ++i) {
    const int64_t top = 2 * i, bottom = std::min(top + 1, x.h - 1);
    const float* rows[2] = {x.data + (image * x.h + top) * x.w * x.c, x.data + (image * x.h + bottom) * x.w * x.c};
    float* to_row = out.data + (image * out.h + i) * out.w * x.c;
    for (int64_t j = 0; j < out.w; ++j) {
      const int64_t left = 2 * j * x.c, right = std::min(2 * j + 1, x.w - 1) * x.c;
      each_vector(x.c, [&](int64_t c, auto load, auto store) {
        const vec sum = load(rows[0] + left + c) + load(rows[0] + right + c) + load(rows[1] + left + c) +
                        load(rows[1] + right + c);
        store(to_row + j * x.c + c, sum * all(0.25f));
      });
    }
  }
}

// Calls visit(row) for the rows of all images; where the result is pooled, that follows each pair of them.
template <class Visit>
static inline void each_row_pooled(const Step& step, const Map* maps, int threads, Visit visit) {
  const Map& out = maps[step.out];
  const int64_t together = step.pooled >= 0 ? 2 : 1, pairs = (out.h + together - 1) / together;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < out.n * pairs; ++task) {
    const int64_t n = task / pairs, top = task % pairs * together;
    for (int64_t h = top; h < std::min(top + together, out.h); ++h) visit(n * out.h + h);
    if (step.pooled >= 0) pool_rows(out, maps[step.pooled], n, top / 2, top / 2 + 1);
  }
}

// Calls visit(first pixel, image, row, first column, columns) for the parts of rows that some pixels make up.
template <class Visit>
static inline void each_row(const Map& out, int64_t from, int64_t count, Visit visit) {
  int64_t row = from / out.w, column = from % out.w;
  for (int64_t i = 0; i < count;) {
    const int64_t columns = std::min(out.w - column, count - i);
    visit(i, row / out.h, row % out.h, column, columns);
    i += columns, ++row, column = 0;
  }
}

// Per tap, where each of some output pixels (counted through all images) finds its input; zeros beyond the borders.
static void find_rows(const Conv& conv, const Map& x, const Map& out, int64_t from, int64_t count, int64_t pitch,
                      const float* zeros, const float** rows) {
  const int64_t step = conv.stride[1] * x.c;
  each_row(out, from, count, [&](int64_t i, int64_t n, int64_t oh, int64_t column, int64_t columns) {
    const float** to = rows + i;
    for (int64_t kh = 0; kh < conv.kernel[0]; ++kh) {
      const int64_t h = oh * conv.stride[0] + kh * conv.dilation[0] - conv.before[0];
      const float* line = x.data + (n * x.h + h) * x.w * x.c;
      const bool beyond = h < 0 || h >= x.h;
      for (int64_t kw = 0; kw < conv.kernel[1]; ++kw, to += pitch) {
        const int64_t shift = kw * conv.dilation[1] - conv.before[1];  // w = column · stride + shift
        int64_t j = 0, w = column * conv.stride[1] + shift;
        const int64_t last = beyond ? 0 : std::min(columns, (x.w - 1 - w + conv.stride[1]) / conv.stride[1]);
        for (; j < last && w < 0; ++j, w += conv.stride[1]) to[j] = zeros;
        const float* place = line + w * x.c;
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
  if (x.c > FEW || conv.span != x.c || conv.kernel[1] == 1 || conv.dilation[1] != 1) return;
  const int64_t reach = (out.w - 1) * conv.stride[1] + conv.kernel[1], left = conv.before[1];
  const int64_t wide = std::max(reach, left + x.w);
  room.assign(x.n * x.h * wide * x.c, 0.f);
  for (int64_t row = 0; row < x.n * x.h; ++row)
    std::copy_n(x.data + row * x.w * x.c, x.w * x.c, room.data() + (row * wide + left) * x.c);
  conv.span *= conv.kernel[1], conv.kernel[1] = 1, conv.before[1] = 0;
  x = {room.data(), x.n, x.h, wide, x.c};
}

static void run_sum(const Step& step, const float* following, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  static thread_local std::vector<float> rooms[4];
  Conv convs[4];
  Map inputs[4];
  for (int64_t i = 0; i < step.convs; ++i) {
    convs[i] = step.conv[i], inputs[i] = maps[convs[i].map];
    join_columns(convs[i], inputs[i], out, rooms[i]);
  }
  const int64_t image = out.h * out.w, pixels = out.n * image, panels = (out.c + step.wide - 1) / step.wide;
  int64_t bytes = 4 * out.c, rows = 0;
  for (int64_t i = 0; i < step.convs; ++i) {
    const Conv& conv = convs[i];
    bytes += 4 * inputs[i].c * conv.stride[0] * conv.stride[1];
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
    found.resize(rows * count);
    Source sources[4];
    int64_t used = 0;
    for (int64_t i = 0; i < step.convs; ++i) {
      const Conv& conv = convs[i];
      sources[i] = {found.data() + used, nullptr, conv.kernel[0] * conv.kernel[1], conv.span, 0, nullptr, 0};
      find_rows(conv, inputs[i], out, from, count, count, zeros, found.data() + used);
      used += sources[i].taps * count;
    }
    Tile tile{sources, step.convs, count, step.bias, {}, step.plains, nullptr, nullptr, out.data + from * out.c, out.c, step.act};
    for (int64_t i = 0; i < step.plains; ++i) tile.plain[i] = maps[step.plain[i]].data + from * out.c;
    if (step.up >= 0) {
      const Map& up = maps[step.up];
      low.resize(count);
      each_row(out, from, count, [&](int64_t i, int64_t n, int64_t h, int64_t column, int64_t columns) {
        const int64_t line = (n * up.h + h / 2) * up.w;
        for (int64_t j = 0; j < columns; ++j) low[i + j] = line + (column + j) / 2;
      });
      tile.up = up.data, tile.low = low.data();
    }
    for (int64_t panel = panels * part / parts; panel < panels * (part + 1) / parts; ++panel) {
      const bool narrow = step.wide == LANES || out.c - panel * WIDE <= LANES;
      const int64_t most = narrow ? NARROW : MOST, tiles = (count + most - 1) / most;
      const Run* runs = narrow ? NARROWS.of : WIDES.of;
      for (int64_t i = 0; i < step.convs; ++i) {
        const Conv& conv = convs[i];
        sources[i].weight = conv.weight + panel * sources[i].taps * conv.span * step.wide;
        sources[i].first = conv.first[panel];
      }
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t first = count * i / tiles, last = count * (i + 1) / tiles;
        for (int64_t j = 0; j < step.convs; ++j) {  // weights come from memory: while one panel is used, the next is read
          const int64_t size = sources[j].taps * sources[j].span;
          sources[j].share = 4 * WIDE / tiles;
          const bool last_of_all = j == 0 && panel == panels - 1 && following;
          const float* next = last_of_all ? following : sources[j].weight + size * WIDE;
          sources[j].ahead = (const char*)next + i * size * sources[j].share;
        }
        runs[last - first - 1](tile, first, panel * step.wide);
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

constexpr int64_t ALONG = 4;  // output pixels of a depthwise convolution at once

static void run_depthwise(const Step& step, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  const Conv& conv = step.conv[0];
  const Map& x = maps[conv.map];
  const int64_t taps = conv.kernel[0] * conv.kernel[1];

  each_row_pooled(step, maps, threads, [&](int64_t row) {
    static thread_local std::vector<const float*> found;
    found.assign(taps * ALONG, zeros);
    for (int64_t ow = 0; ow < out.w; ow += ALONG) {
      const int64_t count = std::min(ALONG, out.w - ow), from = row * out.w + ow;
      if (count < ALONG) std::fill(found.begin(), found.end(), zeros);  // what lies beyond the row is dropped
      find_rows(conv, x, out, from, count, ALONG, zeros, found.data());
      float* to = out.data + from * out.c;
      each_vector(out.c, [&](int64_t c, auto load, auto store) {
        vec sum[ALONG];
        for (int64_t i = 0; i < ALONG; ++i) sum[i] = load(step.bias + c);
        for (int64_t tap = 0; tap < taps; ++tap) {
          const vec weight = load(conv.weight + tap * out.c + c);
          for (int64_t i = 0; i < ALONG; ++i) sum[i] += load(found[tap * ALONG + i] + c) * weight;
        }
        for (int64_t i = 0; i < count; ++i) store(to + i * out.c + c, activate(sum[i], step.act));
      });
    }
  });
}

static void run_affine(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].map], &out = maps[step.out];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    for (int64_t pixel = row * out.w; pixel < (row + 1) * out.w; ++pixel) {
      const float* from = x.data + pixel * x.c;
      float* to = out.data + pixel * out.c + step.offset;
      each_vector(x.c, [&](int64_t c, auto load, auto store) {
        store(to + c, activate(load(from + c) * load(step.scale + c) + load(step.bias + c), step.act));
      });
    }
  });
}

static void run_copy(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].map], &out = maps[step.out];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t pixel = 0; pixel < out.n * out.h * out.w; ++pixel)
    std::copy_n(x.data + pixel * x.c, x.c, out.data + pixel * out.c + step.offset);
}

// Max pooling; what lies beyond the borders does not count.
static void run_greatest(const Step& step, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  const Conv& conv = step.conv[0];
  const Map& x = maps[conv.map];
  const int64_t taps = conv.kernel[0] * conv.kernel[1];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    static thread_local std::vector<const float*> found;
    found.resize(taps * out.w);
    find_rows(conv, x, out, row * out.w, out.w, out.w, zeros, found.data());
    for (int64_t ow = 0; ow < out.w; ++ow) {
      int64_t inside = 0;
      for (int64_t tap = 0; tap < taps; ++tap)
        if (found[tap * out.w + ow] != zeros) found[inside++ * out.w + ow] = found[tap * out.w + ow];
      float* to = out.data + (row * out.w + ow) * out.c;
      each_vector(out.c, [&](int64_t c, auto load, auto store) {
        vec v = load(found[ow] + c);
        for (int64_t tap = 1; tap < inside; ++tap) v = most(v, load(found[tap * out.w + ow] + c));
        store(to + c, activate(v, step.act));
      });
    }
  });
}

static void run_pool(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].map], &out = maps[step.out];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < out.n * out.h; ++row) pool_rows(x, out, row / out.h, row % out.h, row % out.h + 1);
}

extern "C" {
int64_t octify_wide() { return WIDE; }

void octify_run(const Step* steps, int64_t count, const Map* maps, const float* zeros, int64_t threads) {
  for (const Step* step = steps; step < steps + count; ++step) switch (step->kind) {
      case SUM: run_sum(*step, step + 1 < steps + count ? step[1].conv[0].weight : nullptr, maps, zeros, threads); break;
      case DEPTHWISE: run_depthwise(*step, maps, zeros, threads); break;
      case POOL: run_pool(*step, maps, threads); break;
      case AFFINE: run_affine(*step, maps, threads); break;
      case GREATEST: run_greatest(*step, maps, zeros, threads); break;
      case COPY: run_copy(*step, maps, threads); break;
    }
}
}
