// An optimised network's layers on a CPU: float32 maps (N, H, W, C), a list of steps run by one call.
//
// A sum step computes act(Σ conv(x) + bias + Σ plain + up(low)) with everything behind the products done on
// accumulators in registers, and pools its result by 2×2 on the way if somebody reads that: the four paths of an
// octave convolution are two such steps and a low one, none of which passes over a map twice.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "grouped.h"
#include "others.h"
#include "sum.h"

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
      case TAKE: run_take(*step, maps, threads); break;
      case GREATEST: run_windows<true>(*step, maps, zeros, threads); break;
      case AVERAGE: run_windows<false>(*step, maps, zeros, threads); break;
      case RESIZE: run_resize(*step, maps, threads); break;
      case BLEND: run_blend(*step, maps, threads); break;
      case INTERLEAVE: run_interleave(*step, maps, threads); break;
      case MOMENTS: run_moments(*step, maps, threads); break;
      case GROUPS: run_groups(*step, maps, threads); break;
      case VIEW: break;  // a part of another map
    }
}
}
