// Vectors of floats, and activations of them.

#pragma once

#include <algorithm>
#include <cmath>
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

// An activation and its numbers.
enum Kinds {
  NONE = 0, RELU, HARDTANH, SILU, HARDSWISH, SIGMOID, TANH, HARDSIGMOID, LEAKY, ELU, GELU, GELU_TANH, MISH
};
struct Act {
  int64_t kind;
  float a, b;
};

static inline vec sigmoid(vec x) { return reciprocal(all(1.f) + exponential(-x)); }
static inline vec clamped(vec x, float low, float high) { return least(most(x, all(low)), all(high)); }

static inline vec gelu(vec x) {  // max(x, 0) - |x|/2 · erfc(|x|/√2); Abramowitz and Stegun 7.1.26
  const vec size = most(x, -x), t = reciprocal(all(1.f) + all(0.3275911f * 0.70710678f) * size);
  vec p = all(1.061405429f);
  p = p * t - all(1.453152027f);
  p = p * t + all(1.421413741f);
  p = p * t - all(0.284496736f);
  p = p * t + all(0.254829592f);
  return most(x, all(0.f)) - all(0.5f) * size * (p * t * exponential(all(-0.5f) * x * x));
}

static inline vec mish(vec x) {  // x · tanh(log(1 + e^x)), which beyond 20 is x
  const vec e = exponential(least(x, all(20.f))), n = e * (e + all(2.f));
  return x * n * reciprocal(n + all(2.f));
}

ALWAYS_INLINE vec activate(vec x, Act act) {
  switch (act.kind) {
    case RELU: return most(x, all(0.f));
    case HARDTANH: return clamped(x, act.a, act.b);
    case LEAKY: return x < all(0.f) ? x * all(act.a) : x;
    case SILU: return x * sigmoid(x);
    case HARDSWISH: return x * clamped(x + all(3.f), 0.f, 6.f) * all(1.f / 6.f);
    case SIGMOID: return sigmoid(x);
    case TANH: return all(2.f) * sigmoid(x + x) - all(1.f);
    case HARDSIGMOID: return clamped(x + all(3.f), 0.f, 6.f) * all(1.f / 6.f);
    case ELU: return x < all(0.f) ? all(act.a) * (exponential(x) - all(1.f)) : x;
    case GELU: return gelu(x);
    case GELU_TANH: return x * sigmoid(all(1.59576912f) * x * (all(1.f) + all(0.044715f) * x * x));
    case MISH: return mish(x);
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
