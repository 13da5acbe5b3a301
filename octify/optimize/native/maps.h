// Maps and steps, and what every step needs: vectors, activations, where results go, pooling on the way.

#pragma once

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
constexpr int WIDE = 2 * LANES;  // output channels in a panel of weights

#define ALWAYS_INLINE __attribute__((always_inline)) static inline

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4)));

enum Kind { SUM = 0, GROUPED = 1, POOL = 2, BESIDE = 3, GREATEST = 4, MEAN = 5, TAKE = 6 };
enum Act { NONE = 0, RELU = 1, RELU6 = 2, SILU = 3, HARDSWISH = 4, SIGMOID = 5, TANH = 6, HARDSIGMOID = 7 };

struct Map {
  float* data;
  int64_t n, h, w, c;
};

struct Part {
  int64_t map, channels;
};

// What is read: a map, or several side by side as act(scale · x + shift), which never is a whole map. Scale and shift
// may be none; a gate is a map of one position, whose numbers are the scale of its image (or of all).
struct Input {
  int64_t map;
  const Part* parts;  // or none
  int64_t count;
  const float *scale, *shift;
  int64_t act, gate;  // gate: a map or -1
};

struct Conv {
  Input input;
  const float* weight;   // GROUPED: [tap][of group][channel]
  const int64_t* first;  // SUM: the first channel that each panel reads; TAKE: the channels
  int64_t span;          // SUM: how many channels a panel reads; GROUPED: how many channels a group has
  int64_t kernel[2], stride[2], before[2], dilation[2];
};

struct Step {
  int64_t kind, out, pooled, act, convs, plains, up;  // pooled and up: a map or -1
  int64_t wide;        // SUM: output channels in a panel, WIDE or LANES
  int64_t plain[4];
  const float* weights;  // SUM: [panel][convolution][tap][channel][wide], a narrow last panel [LANES]
  const float* bias;     // padded to a multiple of WIDE
  Conv conv[4];
};

// Keeps a vector in its register; else compilers read it again for every product.
#if defined(__AVX512F__)
static inline void hold(vec& v) { asm("" : "+v"(v)); }
#elif defined(__SSE__)
static inline void hold(vec& v) { asm("" : "+x"(v)); }
#else
static inline void hold(vec&) {}
#endif

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

#if defined(__AVX512F__)
static inline vec reciprocal(vec x) {  // to about one unit in the last place; a division takes four times as long
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
  return r * (all(2.f) - x * r);
}
#else
static inline vec reciprocal(vec x) { return all(1.f) / x; }
#endif

static inline vec activate(vec x, int64_t act) {
  switch (act) {
    case RELU: return most(x, all(0.f));
    case RELU6: return least(most(x, all(0.f)), all(6.f));
    case SILU: return x * reciprocal(all(1.f) + exponential(-x));
    case HARDSWISH: return x * least(most(x + all(3.f), all(0.f)), all(6.f)) * all(1.f / 6.f);
    case SIGMOID: return reciprocal(all(1.f) + exponential(-x));
    case TANH: return all(2.f) * reciprocal(all(1.f) + exponential(all(-2.f) * x)) - all(1.f);
    case HARDSIGMOID: return least(most(x + all(3.f), all(0.f)), all(6.f)) * all(1.f / 6.f);
    default: return x;
  }
}

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

// Where a step's sums go: what is added to them there, and the map that they are written to.
struct Out {
  const float* bias;
  const float* plain[4];
  int64_t plains;
  const float* up;
  const int64_t* low;  // per pixel, its place in `up`
  float* out;
  int64_t channels, act;
};

// Fetches what sums will meet when they are finished, so that it is near by then.
ALWAYS_INLINE void fetch(const Out& to, int64_t pixel, int64_t channel, int pixels, int vectors) {
  const int64_t place = pixel * to.channels + channel;
  for (int64_t p = 0; p < to.plains; ++p)
    for (int m = 0; m < pixels; ++m)
      for (int i = 0; i < vectors; ++i) __builtin_prefetch(to.plain[p] + place + m * to.channels + i * LANES);
  if (to.up)
    for (int m = 0; m < pixels; m += 2)  // neighbours share a cell
      for (int i = 0; i < vectors; ++i)
        __builtin_prefetch(to.up + to.low[pixel + m] * to.channels + channel + i * LANES);
  for (int m = 0; m < pixels; ++m)
    for (int i = 0; i < vectors; ++i) __builtin_prefetch(to.out + place + m * to.channels + i * LANES, 1);
}

// Activations that take room of their own.
template <int ACT>
static inline void activate_row(vec* sum, int count) {
  for (int i = 0; i < count; ++i) sum[i] = activate(sum[i], ACT);
}

__attribute__((noinline)) static void activate_all(vec* sum, int count, int64_t act) {
  switch (act) {
    case SILU: return activate_row<SILU>(sum, count);
    case HARDSWISH: return activate_row<HARDSWISH>(sum, count);
    case SIGMOID: return activate_row<SIGMOID>(sum, count);
    case TANH: return activate_row<TANH>(sum, count);
    case HARDSIGMOID: return activate_row<HARDSIGMOID>(sum, count);
  }
}

template <int PIXELS, int VECTORS, class Function>
ALWAYS_INLINE void each_of(vec (&sum)[PIXELS][VECTORS], Function function) {
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) sum[m][i] = function(sum[m][i]);
}

// The sums stay in registers where there is none, or a simple one.
template <int PIXELS, int VECTORS>
ALWAYS_INLINE void activate_in_place(vec (&sum)[PIXELS][VECTORS], int64_t act) {
  if (act == NONE) return;
  if (act == RELU) return each_of(sum, [](vec x) { return activate(x, RELU); });
  if (act == RELU6) return each_of(sum, [](vec x) { return activate(x, RELU6); });
  vec copy[PIXELS][VECTORS];
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) copy[m][i] = sum[m][i];
  activate_all(copy[0], PIXELS * VECTORS, act);
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i) sum[m][i] = copy[m][i];
}

// The first of some vectors of channels whole, the others' first `valid`.
template <int PIXELS, int VECTORS, class Load, class Store>
ALWAYS_INLINE void finish_by(vec (&sum)[PIXELS][VECTORS], const Out& to, int64_t pixel, int64_t channel, int count,
                             Load load, Store store) {
  const int64_t place = pixel * to.channels + channel;
  for (int64_t p = 0; p < to.plains; ++p) {
    const float* plain = to.plain[p] + place;
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i)
        if (m < count) sum[m][i] += load(plain + m * to.channels + i * LANES, i);
  }
  if (to.up)
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i)
        if (m < count) sum[m][i] += load(to.up + to.low[pixel + m] * to.channels + channel + i * LANES, i);
  activate_in_place(sum, to.act);
  float* out = to.out + place;
#pragma GCC unroll 16
  for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
    for (int i = 0; i < VECTORS; ++i)
      if (m < count) store(out + m * to.channels + i * LANES, sum[m][i], i);
}

// Writes sums of `count` pixels from `pixel` on; of the vectors from `channel` on, only what the map has.
template <int PIXELS, int VECTORS>
ALWAYS_INLINE void finish(vec (&sum)[PIXELS][VECTORS], const Out& to, int64_t pixel, int64_t channel, int count) {
  const int64_t valid = to.channels - channel;
  if (valid >= VECTORS * LANES)
    return finish_by(sum, to, pixel, channel, count, [](const float* p, int) { return load(p); },
                     [](float* p, vec v, int) { store(p, v); });
  const int64_t of[2] = {std::min<int64_t>(valid, LANES), std::max<int64_t>(valid - LANES, 0)};
  finish_by(sum, to, pixel, channel, count, [=](const float* p, int i) { return load_some(p, of[i]); },
            [=](float* p, vec v, int i) { store_some(p, v, of[i]); });
}

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

// Calls visit(from, to) for bands of rows, each of one image and counted through all of them; where the result is pooled,
// that follows each band. `band` is an even number of rows.
template <class Visit>
static inline void each_band_pooled(const Step& step, const Map* maps, int64_t band, int threads, Visit visit) {
  const Map& out = maps[step.out];
  const int64_t bands = (out.h + band - 1) / band;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < out.n * bands; ++task) {
    const int64_t n = task / bands, top = task % bands * band, end = std::min(top + band, out.h);
    visit(n * out.h + top, n * out.h + end);
    if (step.pooled >= 0) pool_rows(out, maps[step.pooled], n, top / 2, (end + 1) / 2);
  }
}

// Calls visit(row) for all rows, and pools each pair of them while it is near.
template <class Visit>
static inline void each_row_pooled(const Step& step, const Map* maps, int threads, Visit visit) {
  each_band_pooled(step, maps, 2, threads, [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) visit(row);
  });
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

// The map that is read, or for several side by side one of their size, without data.
static Map map_of(const Input& input, const Map* maps) {
  if (!input.parts) return maps[input.map];
  Map x = maps[input.parts[0].map];
  x.data = nullptr, x.c = 0;
  for (int64_t i = 0; i < input.count; ++i) x.c += input.parts[i].channels;
  return x;
}

// Writes some pixels (counted through all images) of maps side by side, `pitch` numbers from one to the next. A vector of
// channels goes down all pixels, so that its scale and shift stay in registers.
template <class Activate>
static inline void fill_as(const Input& input, const Map* maps, int64_t from, int64_t count, float* to, int64_t pitch,
                           const float* scales, Activate activated) {
  int64_t offset = 0;
  for (const Part* part = input.parts; part < input.parts + input.count; offset += part++->channels) {
    const float* x = maps[part->map].data + from * part->channels;
    each_vector(part->channels, [&](int64_t c, auto load, auto store) {
      const vec scale = scales ? load(scales + offset + c) : all(1.f);
      const vec shift = input.shift ? load(input.shift + offset + c) : all(0.f);
      const float* in = x + c;
      float* out = to + offset + c;
      for (int64_t i = 0; i < count; ++i, in += part->channels, out += pitch)
        store(out, activated(load(in) * scale + shift));
    });
  }
}

static void fill_by(const Input& input, const Map* maps, int64_t from, int64_t count, float* to, int64_t pitch,
                    const float* scales) {
  const int64_t act = input.act;
  if (act == NONE) fill_as(input, maps, from, count, to, pitch, scales, [](vec x) { return x; });
  else if (act == RELU) fill_as(input, maps, from, count, to, pitch, scales, [](vec x) { return activate(x, RELU); });
  else fill_as(input, maps, from, count, to, pitch, scales, [act](vec x) { return activate(x, act); });
}

static void fill(const Input& input, const Map* maps, int64_t from, int64_t count, float* to, int64_t pitch) {
  if (input.gate < 0) return fill_by(input, maps, from, count, to, pitch, input.scale);
  const Map &gate = maps[input.gate], &x = maps[input.parts[0].map];
  for (const int64_t image = x.h * x.w, end = from + count; from < end;) {
    const int64_t n = from / image, here = std::min(end, (n + 1) * image) - from;
    fill_by(input, maps, from, here, to, pitch, gate.data + (gate.n == 1 ? 0 : n) * gate.c);
    from += here, to += here * pitch;
  }
}

// For some pixels (counted through all images), where each finds its cell in a map of half the size.
static void find_cells(const Map& out, const Map& up, int64_t from, int64_t count, std::vector<int64_t>& low) {
  low.resize(count);
  each_row(out, from, count, [&](int64_t i, int64_t n, int64_t h, int64_t column, int64_t columns) {
    const int64_t line = (n * up.h + h / 2) * up.w;
    for (int64_t j = 0; j < columns; ++j) low[i + j] = line + (column + j) / 2;
  });
}

// What a step adds to its sums, and where they go, for some pixels from `from` on.
static Out out_of(const Step& step, const Map* maps, int64_t from, int64_t count, std::vector<int64_t>& low) {
  const Map& out = maps[step.out];
  const int64_t start = from * out.c;
  Out to{step.bias, {}, step.plains, nullptr, nullptr, out.data + start, out.c, step.act};
  for (int64_t i = 0; i < step.plains; ++i) to.plain[i] = maps[step.plain[i]].data + start;
  if (step.up >= 0) {
    find_cells(out, maps[step.up], from, count, low);
    to.up = maps[step.up].data, to.low = low.data();
  }
  return to;
}
