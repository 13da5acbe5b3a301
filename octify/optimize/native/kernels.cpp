// An optimised network's layers on a CPU: float32 maps (N, H, W, C), a list of steps run by one call.
//
// A sum step computes act(Σ conv(x) + bias + Σ plain + up(low)) with everything behind the products done on
// accumulators in registers, and pools its result by 2×2 on the way if somebody reads that: the four paths of an
// octave convolution are two such steps and a low one, none of which passes over a map twice.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "grouped.h"
#include "maps.h"
#include "sum.h"

// Maps side by side.
static void run_beside(const Step& step, const Map* maps, int threads) {
  const Map& out = maps[step.out];
  each_row_pooled(step, maps, threads, [&](int64_t row) {
    fill(step.conv[0].input, maps, row * out.w, out.w, out.data + row * out.w * out.c, out.c);
  });
}

// Max pooling; what lies beyond the borders does not count.
static void run_greatest(const Step& step, const Map* maps, const float* zeros, int threads) {
  const Map& out = maps[step.out];
  const Conv& conv = step.conv[0];
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
      each_vector(out.c, [&](int64_t c, auto load, auto store) {
        vec v = load(found[ow] + c);
        for (int64_t tap = 1; tap < inside; ++tap) v = most(v, load(found[tap * out.w + ow] + c));
        store(to + c, activate(v, step.act));
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
    pool_rows({filled.data(), 1, rows, x.w, x.c}, {out.data + row * out.w * out.c, 1, 1, out.w, out.c}, 0, 0, 1);
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
      const float* row = x.data + (n * x.h + h) * x.w * x.c + c;
      const float* last = row + (x.w - 1) * x.c;
      vec sums[4] = {};
      int64_t w = 0;
      for (; w + 4 <= x.w - 1; w += 4)
        for (int i = 0; i < 4; ++i, row += x.c) sums[i] += at(row);
      for (; w < x.w - 1; ++w, row += x.c) sums[0] += at(row);
      const vec line = (sums[0] + sums[1] + sums[2] + sums[3]) * all(cell) + at(last) * all(width - cell * (x.w - 1));
      total += line * all(h < x.h - 1 ? cell : height - cell * (x.h - 1));
    }
    const vec mean = total / all((float)(height * width));
    float* to = out.data + n * x.c + c;
    valid == LANES ? store(to, mean) : store_some(to, mean, valid);
  }
}

// Channels of maps side by side in an order of their own.
static void run_take(const Step& step, const Map* maps) {
  const Conv& conv = step.conv[0];
  const Map& out = maps[step.out];
  std::vector<float> filled(map_of(conv.input, maps).c);
  for (int64_t pixel = 0; pixel < out.n * out.h * out.w; ++pixel) {
    fill(conv.input, maps, pixel, 1, filled.data(), filled.size());
    for (int64_t c = 0; c < out.c; ++c) out.data[pixel * out.c + c] = filled[conv.first[c]];
  }
}

extern "C" {
int64_t octify_wide() { return WIDE; }

// Asks for large pages for memory that nothing was written to yet: weights are read once a call, page after page.
void octify_enlarge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t page = 4096, from = ((uintptr_t)memory + page - 1) / page * page;
  const uintptr_t to = ((uintptr_t)memory + bytes) / page * page;
  if (from < to) madvise((void*)from, to - from, MADV_HUGEPAGE);  // where there are none, small ones do
#endif
}

void octify_run(const Step* steps, int64_t count, const Map* maps, const float* zeros, int64_t threads) {
  for (const Step* step = steps; step < steps + count; ++step) switch (step->kind) {
      case SUM: run_sum(*step, first_panel(step + 1, steps + count), maps, zeros, threads); break;
      case GROUPED: run_grouped(*step, maps, threads); break;
      case POOL: run_pool(*step, maps, threads); break;
      case BESIDE: run_beside(*step, maps, threads); break;
      case MEAN: run_mean(*step, maps, threads); break;
      case TAKE: run_take(*step, maps); break;
      case GREATEST: run_greatest(*step, maps, zeros, threads); break;
    }
}
}
