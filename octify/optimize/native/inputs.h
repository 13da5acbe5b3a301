// What convolutions of one tap read without a map of it being written: maps side by side, scaled, gated, activated.

#pragma once

#include "maps.h"

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
                           const float* scales, const float* shifts, Activate activated) {
  int64_t offset = 0;
  for (const Part* part = input.parts; part < input.parts + input.count; offset += part++->channels) {
    const int64_t step = maps[part->map].pitch;
    const float* x = maps[part->map].data + from * step;
    each_vector(part->channels, [&](int64_t c, auto load, auto store) {
      const vec scale = scales ? load(scales + offset + c) : all(1.f);
      const vec shift = shifts ? load(shifts + offset + c) : all(0.f);
      const float* in = x + c;
      float* out = to + offset + c;
      for (int64_t i = 0; i < count; ++i, in += step, out += pitch) store(out, activated(load(in) * scale + shift));
    });
  }
}

static void fill_by(const Input& input, const Map* maps, int64_t from, int64_t count, float* to, int64_t pitch,
                    const float* scales, const float* shifts) {
  const Act act = input.act;
  const auto each = [&](auto activated) { fill_as(input, maps, from, count, to, pitch, scales, shifts, activated); };
  if (act.kind == NONE) each([](vec x) { return x; });
  else if (act.kind == RELU) each([](vec x) { return most(x, all(0.f)); });
  else each([act](vec x) { return activate(x, act); });
}

// The same for one map, each of whose numbers becomes value(pixel, channel, number, load).
template <class Value>
static inline void fill_each(const Input& input, const Map& x, int64_t from, int64_t count, float* to, int64_t pitch,
                             Value value) {
  for (int64_t i = 0; i < count; ++i, to += pitch)
    each_vector(x.c, [&](int64_t c, auto load, auto store) {
      store(to + c, activate(value(from + i, c, load(x.data + (from + i) * x.pitch + c), load), input.act));
    });
}

static void fill(const Input& input, const Map* maps, int64_t from, int64_t count, float* to, int64_t pitch) {
  const Map& x = maps[input.parts[0].map];
  if (input.moments >= 0) {
    const Map& moments = maps[input.moments];
    fill_each(input, x, from, count, to, pitch, [&](int64_t pixel, int64_t c, vec v, auto load) {
      const float* of = moments.data + pixel * moments.pitch;
      v = (v - all(of[0])) * all(of[1]) + all(of[2]);
      return (input.scale ? v * load(input.scale + c) : v) + (input.shift ? load(input.shift + c) : all(0.f));
    });
    return;
  }
  if (input.gate < 0) return fill_by(input, maps, from, count, to, pitch, input.scale, input.shift);
  const Map& gate = maps[input.gate];
  const int64_t image = x.h * x.w, end = from + count;
  if (gate.h * gate.w > 1) {
    fill_each(input, x, from, count, to, pitch, [&](int64_t pixel, int64_t c, vec v, auto load) {
      const float* of = gate.data + (gate.n == 1 ? pixel % image : pixel) * gate.pitch;
      return v * (gate.c == 1 ? all(of[0]) : load(of + c));
    });
    return;
  }
  while (from < end) {  // image by image
    const int64_t n = from / image, here = std::min(end, (n + 1) * image) - from;
    const float* factors = gate.data + (gate.n == 1 ? 0 : n) * gate.pitch;
    fill_by(input, maps, from, here, to, pitch, factors, gate.c == 2 * x.c ? factors + x.c : input.shift);
    from += here, to += here * pitch;
  }
}
