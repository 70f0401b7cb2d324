// A block a row: the row is read twice at most, the second time from the cache.
#include "cuda/device.h"
#include "cuda/operations.h"

namespace pyqe::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) inverse_softmax_rows(InverseSoftmax args) {
  __shared__ float scratch[kThreads / kWarp];
  const std::int64_t row = blockIdx.x;
  const T* probs = static_cast<const T*>(args.probs.data) + row * args.probs.stride;
  float* logits = args.logits + row * args.classes;
  float total = 0;    // of what the centre is made of
  float invalid = 0;  // NaN as soon as one probability is
  for (std::int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
    const float p = as_float(probs[c]);
    if (!(p >= 0)) invalid = 1;
    total += args.center == Center::kMean ? logf(fmaxf(p, args.eps)) : fmaxf(p, args.eps);
  }
  total = block_sum(total, scratch);
  invalid = block_sum(invalid, scratch);
  float centre = 0;
  if (args.center == Center::kMean) centre = total / static_cast<float>(args.classes);
  if (args.center == Center::kLogSumExp) centre = logf(total);
  const bool valid = invalid == 0 && std::isfinite(centre);
  for (std::int64_t c = threadIdx.x; c < args.classes; c += kThreads) {
    logits[c] = valid ? logf(fmaxf(as_float(probs[c]), args.eps)) - centre : NAN;
  }
}

}  // namespace

void inverse_softmax(const InverseSoftmax& args, Stream stream) {
  for_dtype(args.dtype, [&](auto type) {
    launch(inverse_softmax_rows<decltype(type)>, dim3(static_cast<unsigned>(args.n)), dim3(kThreads), 0,
           stream, args);
  });
}

}  // namespace pyqe::cuda
