// Maps and steps, and what every step needs: where results go, pooling on the way.

#pragma once

#include "vectors.h"

enum Kind { SUM = 0, GROUPED, POOL, BESIDE, GREATEST, MEAN, TAKE, AVERAGE, RESIZE, MOMENTS, VIEW, GROUPS, BLEND, INTERLEAVE };

struct Map {
  float* data;
  int64_t n, h, w, c, pitch;  // pitch: numbers from one position to the next; more than channels in a part of a map
};

struct Part {
  int64_t map, channels;
};

// What is read: a map, or several side by side as act(scale · x + shift), which never is a whole map. Scale and shift
// may be none; a gate is a map of one image, channel or position, or of all there are, by which that is multiplied; one
// of twice as many channels holds what is added then as well.
// Instead of all that, positions may be centred first, by numbers of their own: (x - centre) · factor + rest.
struct Input {
  int64_t map;
  const Part* parts;  // or none
  int64_t count;
  const float *scale, *shift;
  Act act;
  int64_t gate, moments;  // maps or -1; moments: of three channels
};

struct Conv {
  Input input;
  const float* weight;   // GROUPED: [tap][of group][channel]
  const int64_t* first;  // SUM: the first channel that each panel reads; TAKE: the channels; GROUPS: each one's; BLEND: whether corners are met
  int64_t span;          // SUM: how many channels a panel reads; GROUPED: how many a group has; AVERAGE: of how many, or 0; GROUPS: how many
  int64_t kernel[2], stride[2], before[2], dilation[2];  // before: SAME pads as TensorFlow does
  int64_t edge;  // what lies beyond the borders: nothing, the edge again, or that only where windows do not fit
};

constexpr int64_t SAME = -1, REPEATED = 1, REPEATED_UNLESS_FITTING = 2;

// Output channels that are computed at once, `width` at most (WIDE or LANES); where their weights begin, in rows' numbers.
struct Panel {
  int64_t first, outputs, width, begin;
};

struct Step {
  int64_t kind, out, pooled, convs, plains, up;  // pooled and up: a map or -1
  Act act;
  int64_t panels;      // SUM
  const Panel* panel;
  int64_t plain[4];
  const float* weights;  // SUM: [panel][convolution][tap][channel][width]
  const float* bias;     // padded by WIDE and to a multiple of it
  Conv conv[4];
};


// Where a step's sums go: what is added to them there, and the map that they are written to.
struct Out {
  const float* bias;
  const float* plain[4];
  int64_t plains, pitches[4];
  const float* up;
  const int64_t* low;  // per pixel, its place in `up`
  float* out;
  int64_t channels, end;  // end: of the channels that may be written
  Act act;
};

// Fetches what sums will meet when they are finished, so that it is near by then.
ALWAYS_INLINE void fetch(const Out& to, int64_t pixel, int64_t channel, int pixels, int vectors) {
  const int64_t place = pixel * to.channels + channel;
  for (int64_t p = 0; p < to.plains; ++p)
    for (int m = 0; m < pixels; ++m)
      for (int i = 0; i < vectors; ++i) __builtin_prefetch(to.plain[p] + (pixel + m) * to.pitches[p] + channel + i * LANES);
  if (to.up)
    for (int m = 0; m < pixels; m += 2)  // neighbours share a cell
      for (int i = 0; i < vectors; ++i)
        __builtin_prefetch(to.up + to.low[pixel + m] + channel + i * LANES);
  for (int m = 0; m < pixels; ++m)
    for (int i = 0; i < vectors; ++i) __builtin_prefetch(to.out + place + m * to.channels + i * LANES, 1);
}

// Activations that take room of their own.
template <int KIND>
static inline void activate_row(vec* sum, int count, Act act) {
  act.kind = KIND;
  for (int i = 0; i < count; ++i) sum[i] = activate(sum[i], act);
}

__attribute__((noinline)) static void activate_all(vec* sum, int count, Act act) {
  switch (act.kind) {
    case SILU: return activate_row<SILU>(sum, count, act);
    case HARDSWISH: return activate_row<HARDSWISH>(sum, count, act);
    case SIGMOID: return activate_row<SIGMOID>(sum, count, act);
    case TANH: return activate_row<TANH>(sum, count, act);
    case HARDSIGMOID: return activate_row<HARDSIGMOID>(sum, count, act);
    case ELU: return activate_row<ELU>(sum, count, act);
    case GELU: return activate_row<GELU>(sum, count, act);
    case GELU_TANH: return activate_row<GELU_TANH>(sum, count, act);
    case MISH: return activate_row<MISH>(sum, count, act);
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
ALWAYS_INLINE void activate_in_place(vec (&sum)[PIXELS][VECTORS], Act act) {
  if (act.kind == NONE) return;
  if (act.kind == RELU) return each_of(sum, [](vec x) { return activate(x, {RELU, 0, 0}); });
  if (act.kind == HARDTANH) return each_of(sum, [=](vec x) { return activate(x, {HARDTANH, act.a, act.b}); });
  if (act.kind == LEAKY) return each_of(sum, [=](vec x) { return activate(x, {LEAKY, act.a, 0}); });
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
    const int64_t pitch = to.pitches[p];
    const float* plain = to.plain[p] + pixel * pitch + channel;
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i)
        if (m < count) sum[m][i] += load(plain + m * pitch + i * LANES, i);
  }
  if (to.up)
#pragma GCC unroll 16
    for (int m = 0; m < PIXELS; ++m)
#pragma GCC unroll 2
      for (int i = 0; i < VECTORS; ++i)
        if (m < count) sum[m][i] += load(to.up + to.low[pixel + m] + channel + i * LANES, i);
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
  const int64_t valid = to.end - channel;
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
    const float* lines = x.data + image * x.h * x.w * x.pitch;
    const float* rows[2] = {lines + top * x.w * x.pitch, lines + bottom * x.w * x.pitch};
    float* to_row = out.data + (image * out.h + i) * out.w * x.c;
    for (int64_t j = 0; j < out.w; ++j) {
      const int64_t left = 2 * j * x.pitch, right = std::min(2 * j + 1, x.w - 1) * x.pitch;
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

// For some pixels (counted through all images), where each finds its cell in a map of half the size, in numbers.
static void find_cells(const Map& out, const Map& up, int64_t from, int64_t count, std::vector<int64_t>& low) {
  low.resize(count);
  each_row(out, from, count, [&](int64_t i, int64_t n, int64_t h, int64_t column, int64_t columns) {
    const int64_t line = (n * up.h + h / 2) * up.w;
    for (int64_t j = 0; j < columns; ++j) low[i + j] = (line + (column + j) / 2) * up.pitch;
  });
}

// What a step adds to its sums, and where they go, for some pixels from `from` on.
static Out out_of(const Step& step, const Map* maps, int64_t from, int64_t count, std::vector<int64_t>& low) {
  const Map& out = maps[step.out];
  const int64_t start = from * out.c;
  Out to{step.bias, {}, step.plains, {}, nullptr, nullptr, out.data + start, out.c, out.c, step.act};
  for (int64_t i = 0; i < step.plains; ++i) {
    const Map& plain = maps[step.plain[i]];
    to.plain[i] = plain.data + from * plain.pitch, to.pitches[i] = plain.pitch;
  }
  if (step.up >= 0) {
    find_cells(out, maps[step.up], from, count, low);
    to.up = maps[step.up].data, to.low = low.data();
  }
  return to;
}

// A convolution whose padding is known, as its input's size tells it. (Windows fit as PyTorch's own padding has it.)
static Conv settled(Conv conv, const Map* maps, const Map& out) {
  const Map& x = maps[conv.input.map];
  const int64_t sizes[2][2] = {{x.h, out.h}, {x.w, out.w}};
  bool fits = true;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t reach = (sizes[axis][1] - 1) * conv.stride[axis] + conv.dilation[axis] * (conv.kernel[axis] - 1) + 1;
    if (conv.before[axis] == SAME) conv.before[axis] = std::max<int64_t>(0, reach - sizes[axis][0]) / 2;
    const int64_t room = sizes[axis][0] + 2 * conv.before[axis] - conv.kernel[axis];
    if (room / conv.stride[axis] + 1 != sizes[axis][1] || 2 * conv.before[axis] > conv.kernel[axis]) fits = false;
  }
  if (conv.edge == REPEATED_UNLESS_FITTING) conv.edge = fits ? 0 : REPEATED;
  return conv;
}
