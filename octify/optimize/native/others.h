// What is no convolution: pooling, means, moments, and maps put side by side, reordered or enlarged.

#pragma once

#include "sum.h"

// Maps side by side.
static void run_beside(const Step& step, const Map* maps, int threads) {
  const Map& out = maps[step.out];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    fill(step.conv[0].input, maps, row * out.w, out.w, out.data + row * out.w * out.c, out.c);
  });
}

// The greatest value of windows, or their average over what lies within the borders (or, with a span, over so many).
template <bool GREATEST_OF>
static void run_windows(const Step& step, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  const Conv conv = settled(step.conv[0], maps, out);
  const Map& x = maps[conv.input.map];
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
      const vec share = all(1.f / (conv.span ? conv.span : inside));
      each_vector(out.c, [&](int64_t c, auto load, auto store) {
        vec v = load(found[ow] + c);
        for (int64_t tap = 1; tap < inside; ++tap) {
          const vec next = load(found[tap * out.w + ow] + c);
          v = GREATEST_OF ? most(v, next) : v + next;
        }
        store(to + c, GREATEST_OF ? v : v * share);
      });
    }
  });
}

static void run_pool(const Step& step, const Map* maps, int threads) {
  const Input& input = step.conv[0].input;
  const Map x = map_of(input, maps);
  const Map& out = maps[step.out];
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < out.n * out.h; ++row) {
    const int64_t n = row / out.h, top = row % out.h;
    if (x.data) {
      pool_rows(x, out, n, top, top + 1);
      continue;
    }
    static thread_local std::vector<float> filled;
    const int64_t rows = std::min<int64_t>(2, x.h - 2 * top);
    filled.resize(rows * x.w * x.c);
    fill(input, maps, (n * x.h + 2 * top) * x.w, rows * x.w, filled.data(), x.c);
    pool_rows({filled.data(), 1, rows, x.w, x.c, x.c}, {out.data + row * out.w * out.c, 1, 1, out.w, out.c, out.c}, 0, 0, 1);
  }
}

// The mean of each channel. A map on the low grid of another (`up`) counts each position as often as that one has it.
static void run_mean(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].input.map], &out = maps[step.out];
  const int64_t vectors = (x.c + LANES - 1) / LANES, height = step.up < 0 ? x.h : maps[step.up].h;
  const int64_t width = step.up < 0 ? x.w : maps[step.up].w, cell = step.up < 0 ? 1 : 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < x.n * vectors; ++task) {
    const int64_t n = task / vectors, c = task % vectors * LANES, valid = std::min<int64_t>(LANES, x.c - c);
    const auto at = [&](const float* p) { return valid == LANES ? load(p) : load_some(p, valid); };
    vec total{};
    for (int64_t h = 0; h < x.h; ++h) {
      const float* row = x.data + (n * x.h + h) * x.w * x.pitch + c;
      const float* last = row + (x.w - 1) * x.pitch;
      vec sums[4] = {};
      int64_t w = 0;
      for (; w + 4 <= x.w - 1; w += 4)
        for (int i = 0; i < 4; ++i, row += x.pitch) sums[i] += at(row);
      for (; w < x.w - 1; ++w, row += x.pitch) sums[0] += at(row);
      const vec line = (sums[0] + sums[1] + sums[2] + sums[3]) * all(cell) + at(last) * all(width - cell * (x.w - 1));
      total += line * all(h < x.h - 1 ? cell : height - cell * (x.h - 1));
    }
    const vec mean = total / all((float)(height * width));
    float* to = out.data + n * x.c + c;
    valid == LANES ? store(to, mean) : store_some(to, mean, valid);
  }
}

// Channels of maps side by side in an order of their own.
static void run_take(const Step& step, const Map* maps, int threads) {
  const Conv& conv = step.conv[0];
  const Map& out = maps[step.out];
  const int64_t channels = map_of(conv.input, maps).c;
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    static thread_local std::vector<float> filled;
    filled.resize(out.w * channels);
    fill(conv.input, maps, row * out.w, out.w, filled.data(), channels);
    const float* from = filled.data();
    float* to = out.data + row * out.w * out.c;
    for (int64_t w = 0; w < out.w; ++w, from += channels, to += out.c)
      for (int64_t c = 0; c < out.c; ++c) to[c] = from[conv.first[c]];
  });
}

// Where nearest resizing finds a position, as PyTorch reckons it.
static inline int64_t nearest(int64_t place, int64_t out, int64_t in) {
  if (out == in) return place;
  return std::min<int64_t>((int64_t)(place * ((float)in / out)), in - 1);
}

static void run_resize(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].input.map], &out = maps[step.out];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    const float* line = x.data + (row / out.h * x.h + nearest(row % out.h, out.h, x.h)) * x.w * x.pitch;
    float* to = out.data + row * out.w * out.c;
    for (int64_t w = 0; w < out.w; ++w, to += out.c) {
      const float* from = line + nearest(w, out.w, x.w) * x.pitch;
      each_vector(out.c, [&](int64_t c, auto load, auto store) { store(to + c, load(from + c)); });
    }
  });
}

// Between which two positions bilinear resizing finds one, and how far it is on the way to the second.
struct Between {
  int64_t first, second;
  float share;
};

static Between between(int64_t place, int64_t out, int64_t in, bool corners) {
  const float scale = corners ? (out > 1 ? (float)(in - 1) / (out - 1) : 0.f) : (float)in / out;
  const float at = corners ? scale * place : std::max(scale * (place + 0.5f) - 0.5f, 0.f);
  const int64_t first = std::min<int64_t>((int64_t)at, in - 1);
  return {first, std::min(first + 1, in - 1), std::min(at - first, 1.f)};
}

static void run_blend(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].input.map], &out = maps[step.out];
  const bool corners = step.conv[0].first[0];
  std::vector<Between> columns(out.w);
  for (int64_t w = 0; w < out.w; ++w) columns[w] = between(w, out.w, x.w, corners);
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    const Between lines = between(row % out.h, out.h, x.h, corners);
    const float* image = x.data + row / out.h * x.h * x.w * x.pitch;
    const float *top = image + lines.first * x.w * x.pitch, *bottom = image + lines.second * x.w * x.pitch;
    const vec down = all(lines.share), up = all(1.f - lines.share);
    float* to = out.data + row * out.w * out.c;
    for (int64_t w = 0; w < out.w; ++w, to += out.c) {
      const int64_t left = columns[w].first * x.pitch, right = columns[w].second * x.pitch;
      const vec there = all(columns[w].share), here = all(1.f - columns[w].share);
      each_vector(out.c, [&](int64_t c, auto load, auto store) {
        const vec above = load(top + left + c) * here + load(top + right + c) * there;
        const vec below = load(bottom + left + c) * here + load(bottom + right + c) * there;
        store(to + c, above * up + below * down);
      });
    }
  });
}

// Four maps in turns, along rows and columns.
static void run_interleave(const Step& step, const Map* maps, int threads) {
  const Map& out = maps[step.out];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    const int64_t n = row / out.h, h = row % out.h;
    for (int64_t parity = 0; parity < 2; ++parity) {
      const Map& x = maps[step.conv[2 * (h & 1) + parity].input.map];
      const float* from = x.data + (n * x.h + h / 2) * x.w * x.pitch;
      float* to = out.data + row * out.w * out.c;
      for (int64_t w = parity; w < out.w; w += 2, from += x.pitch)
        each_vector(out.c, [&](int64_t c, auto load, auto store) { store(to + w * out.c + c, load(from + c)); });
    }
  });
}

struct Moments {
  float mean, variance;
};

static Moments moments_of(const float* x, int64_t channels) {
  const auto total = [&](auto of) {
    vec sum{};
    each_vector(channels, [&](int64_t c, auto load, auto) {
      const int64_t valid = std::min<int64_t>(LANES, channels - c);
      float lanes[LANES] = {};
      const vec v = of(load(x + c));
      if (valid == LANES) sum += v;
      else store(lanes, v), std::fill(lanes + valid, lanes + LANES, 0.f), sum += ::load(lanes);
    });
    float result = 0;
    for (int i = 0; i < LANES; ++i) result += sum[i];
    return result / channels;
  };
  const float mean = total([](vec v) { return v; });
  return {mean, total([=](vec v) { return (v - all(mean)) * (v - all(mean)); })};
}

// For a norm over the channels of each position: what centres and scales it there, of a map or of both bands (`up` is the
// low one, whose own numbers are the averages over the positions that one of its stands for).
static void run_moments(const Step& step, const Map* maps, int threads) {
  const Map &x = maps[step.conv[0].input.map], &out = maps[step.out];
  const bool bands = step.up >= 0;
  const Map low = bands ? maps[step.up] : Map{};
  const float part = bands ? (float)low.c / (low.c + x.c) : 0.f;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < x.n * ((x.h + 1) / 2); ++task) {
    const int64_t n = task / ((x.h + 1) / 2), top = task % ((x.h + 1) / 2) * 2, rows = std::min<int64_t>(2, x.h - top);
    for (int64_t left = 0; left < x.w; left += 2) {
      const int64_t columns = std::min<int64_t>(2, x.w - left), cell = (n * low.h + top / 2) * low.w + left / 2;
      const Moments raised = bands ? moments_of(low.data + cell * low.pitch, low.c) : Moments{};
      float scale = 0, rest = 0;
      for (int64_t i = 0; i < rows * columns; ++i) {
        const int64_t pixel = (n * x.h + top + i / columns) * x.w + left + i % columns;
        const Moments own = moments_of(x.data + pixel * x.pitch, x.c);
        const float mean = own.mean + part * (raised.mean - own.mean);
        const float first = own.mean - mean, second = raised.mean - mean;
        const float variance = (1 - part) * (own.variance + first * first) + part * (raised.variance + second * second);
        const float factor = 1 / std::sqrt(variance + step.act.a);
        float* to = out.data + pixel * 3;
        to[0] = mean, to[1] = factor, to[2] = 0;
        scale += factor, rest += second * factor;
      }
      if (!bands) continue;
      float* to = maps[step.pooled].data + cell * 3;
      to[0] = raised.mean, to[1] = scale / (rows * columns), to[2] = rest / (rows * columns);
    }
  }
}

// Each channel's mean and variance over the positions of an image, in one pass around the first one's number; a map on
// the low grid of another (`full`) counts each position as often as that one has it.
static void channel_moments(const Map& x, const Map& full, int64_t n, int64_t c, float* mean, float* variance) {
  const int64_t valid = std::min<int64_t>(LANES, x.c - c), cell = x.data == full.data ? 1 : 2;
  const auto at = [&](const float* p) { return valid == LANES ? load(p) : load_some(p, valid); };
  const float* image = x.data + n * x.h * x.w * x.pitch + c;
  const vec origin = at(image);
  vec first{}, second{};
  for (int64_t h = 0; h < x.h; ++h) {
    const float* row = image + h * x.w * x.pitch;
    vec sums[2] = {}, squares[2] = {};
    for (int64_t w = 0; w < x.w - 1; ++w, row += x.pitch) {
      const vec d = at(row) - origin;
      sums[w & 1] += d, squares[w & 1] += d * d;
    }
    const vec last = at(row) - origin, tail = all((float)(full.w - cell * (x.w - 1)));
    const vec times = all((float)(h < x.h - 1 ? cell : full.h - cell * (x.h - 1)));
    first += ((sums[0] + sums[1]) * all((float)cell) + last * tail) * times;
    second += ((squares[0] + squares[1]) * all((float)cell) + last * last * tail) * times;
  }
  const vec share = all(1.f / (full.h * full.w)), moved = first * share, spread = second * share - moved * moved;
  const vec centre = origin + moved;
  valid == LANES ? store(mean, centre) : store_some(mean, centre, valid);
  valid == LANES ? store(variance, spread) : store_some(variance, spread, valid);
}

// What a group norm multiplies each channel of each image by, and what it adds then, of a map or of both bands.
static void run_groups(const Step& step, const Map* maps, int threads) {
  const Conv& conv = step.conv[0];
  const Map &x = maps[conv.input.parts[0].map], &out = maps[step.out];
  const Map* bands[2] = {&x, step.up < 0 ? nullptr : &maps[step.up]};
  const int64_t count = step.up < 0 ? 1 : 2, vectors = (x.c + LANES - 1) / LANES;
  const int64_t all_vectors = vectors + (count > 1 ? (bands[1]->c + LANES - 1) / LANES : 0);
  // Means and variances first, where factors and offsets come to stand.
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < x.n * all_vectors; ++task) {
    const int64_t n = task / all_vectors, v = task % all_vectors, second = v >= vectors;
    const Map& band = *bands[second];
    const int64_t c = (second ? v - vectors : v) * LANES;
    float* to = out.data + n * out.c + (second ? 2 * x.c : 0) + c;
    channel_moments(band, x, n, c, to, to + band.c);
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < x.n; ++n) {
    std::vector<float> members(conv.span), means(conv.span), spreads(conv.span);
    const auto each = [&](auto act) {
      int64_t channel = 0;
      for (int64_t i = 0; i < count; ++i) {
        float* to = out.data + n * out.c + 2 * channel;
        for (int64_t c = 0; c < bands[i]->c; ++c, ++channel) act(conv.first[channel], channel, to[c], to[c + bands[i]->c]);
      }
    };
    each([&](int64_t group, int64_t, float mean, float) { members[group] += 1, means[group] += mean; });
    for (int64_t group = 0; group < conv.span; ++group) means[group] /= members[group];
    each([&](int64_t group, int64_t, float mean, float variance) {
      spreads[group] += (variance + (mean - means[group]) * (mean - means[group])) / members[group];
    });
    each([&](int64_t group, int64_t channel, float& mean, float& variance) {
      mean = conv.input.scale[channel] / std::sqrt(std::max(spreads[group], 0.f) + step.act.a);
      variance = conv.input.shift[channel] - means[group] * mean;
    });
  }
}
