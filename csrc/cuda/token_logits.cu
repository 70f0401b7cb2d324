// The work is a gather of rows that lie anywhere in hundreds of megabytes, and memory decides: every warp has
// several loads of 16 bytes a lane in flight before it uses the first, and no warp waits for another.
//
// Rows that are not aligned to 16 bytes are read element by element; which lane adds what, and when, is the
// same, and so are the bits.
#include "cuda/device.h"
#include "cuda/token_logits.h"

namespace pyqe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;

__device__ std::int64_t warp_of_grid() {
  return static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
}

dim3 blocks_for(std::int64_t warps) { return dim3(static_cast<unsigned>((warps + kWarps - 1) / kWarps)); }

template <class T>
__device__ const T* row_of(const Matrix& matrix, std::int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.stride;
}

bool is_aligned(const Matrix& matrix, DType dtype) {
  const std::int64_t bytes = matrix.stride * (dtype == DType::kFloat32 ? 4 : 2);
  return (reinterpret_cast<std::uintptr_t>(matrix.data) | static_cast<std::uintptr_t>(bytes)) % 16 == 0;
}

// --- logits: a warp for each pair of a row and a token ---

// What a load brings, or as many elements one by one.
template <bool kAligned, class T>
__device__ Vector<T> vector_at(const T* address) {
  if constexpr (kAligned) {
    return load(address);
  } else {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kPerLoad<T>; ++i) vector.items[i] = address[i];
    return vector;
  }
}

// A lane's part of a product: four loads of each row at a time, a sum for each. The row of hidden states is
// shared by the warps next to this one, so its loads hit the first cache.
template <class T, bool kAligned>
struct Dot {
  static constexpr int kAtOnce = 4, kColumns = kWarp * kPerLoad<T>;
  const T *x, *y;
  float sums[kAtOnce] = {};

  // With a condition on each load the compiler would wait for one before it starts the next: a lane that has
  // nothing left reads the row's beginning again, for nothing.
  template <bool kWhole>
  __device__ void add(std::int64_t d, std::int64_t dim) {
    Vector<T> from_x[kAtOnce], from_y[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const std::int64_t column = d + i * kColumns;
      const std::int64_t inside = kWhole || column + kPerLoad<T> <= dim ? column : 0;
      from_y[i] = vector_at<kAligned>(y + inside);
      from_x[i] = vector_at<kAligned>(x + inside);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (!kWhole && d + i * kColumns + kPerLoad<T> > dim) from_x[i] = from_y[i] = {};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < kPerLoad<T>; ++j)
        sums[i] = fmaf(as_float(from_x[i].items[j]), as_float(from_y[i].items[j]), sums[i]);
    }
  }

  __device__ float of(std::int64_t dim) {
    const std::int64_t lane = threadIdx.x % kWarp;
    const std::int64_t whole = dim / kPerLoad<T> * kPerLoad<T>;
    std::int64_t d = 0;
#pragma unroll 1
    for (; d + kAtOnce * kColumns <= whole; d += kAtOnce * kColumns) add<true>(d + lane * kPerLoad<T>, dim);
    if (d < whole) add<false>(d + lane * kPerLoad<T>, dim);
    // one lane has what no load covers
    if (lane == whole / kPerLoad<T> % kWarp) {
#pragma unroll 1
      for (std::int64_t i = whole; i < dim; ++i) sums[0] = fmaf(as_float(x[i]), as_float(y[i]), sums[0]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, 3) dot_rows(TokenLogits args) {
  const std::int64_t pair = warp_of_grid();
  if (pair >= args.n * args.k) return;
  const bool writes = threadIdx.x % kWarp == 0;
  const std::int64_t token = args.token_ids[pair];
  if (token < 0 || token >= args.vocab) {
    if (writes) args.logits[pair] = NAN;
    return;
  }
  Dot<T, kAligned> dot{row_of<T>(args.hidden, pair / args.k), row_of<T>(args.weight, token)};
  const float sum = warp_sum(dot.of(args.dim));
  const T* bias = static_cast<const T*>(args.bias);
  if (writes) args.logits[pair] = bias ? sum + as_float(bias[token]) : sum;
}

// --- gradients: weighted sums of rows, a strip of columns for each warp ---

template <class T, int kWidth>
__device__ Vector<T, kWidth> load_columns(const T* address) {
  if constexpr (kWidth == 1) {
    return {*address};
  } else {
    return load(address);
  }
}

// A term of a sum: which row, -1 for zeros, and how often.
struct Term {
  std::int64_t row;
  float coefficient;
};

// kParts times kWidth columns of a weighted sum of rows for each lane, next to each other kWidth at a time.
template <class T, int kWidth>
struct Strip {
  static constexpr int kParts = kWidth == 1 ? 8 : 2, kColumns = kWarp * kWidth * kParts;
  static constexpr int kAtOnce = 8 / kParts;  // terms
  std::int64_t first, dim;
  float sums[kParts][kWidth];

  __device__ Strip(std::int64_t strip, std::int64_t dim)
      : first(strip * kColumns + threadIdx.x % kWarp * kWidth), dim(dim) {
    clear();
  }

  __device__ void clear() {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sums[p][i] = 0;
    }
  }

  __device__ std::int64_t column(int p) const { return first + p * kWarp * kWidth; }

  // Adds `count` terms in their order. Each lane looks up a term for all of them.
  template <class TermAt>
  __device__ void add(const Matrix& matrix, std::int64_t count, const TermAt& term_at) {
    for (std::int64_t i = 0; i < count; i += kWarp) {
      const std::int64_t left = count - i, lane = threadIdx.x % kWarp;
      const Term mine = lane < left ? term_at(i + lane) : Term{-1, 0};
      const int here = left < kWarp ? static_cast<int>(left) : kWarp;
      for (int j = 0; j < here; j += kAtOnce) {
        std::int64_t rows[kAtOnce];
        float coefficients[kAtOnce];
        bool whole = first - lane * kWidth + kColumns <= dim;
#pragma unroll
        for (int t = 0; t < kAtOnce; ++t) {
          rows[t] = __shfl_sync(kAllLanes, mine.row, j + t);
          coefficients[t] = __shfl_sync(kAllLanes, mine.coefficient, j + t);
          whole = whole && rows[t] >= 0;
        }
        whole ? add_some<true>(matrix, rows, coefficients) : add_some<false>(matrix, rows, coefficients);
      }
    }
  }

  // kWhole: all rows exist, and all columns.
  template <bool kWhole>
  __device__ void add_some(const Matrix& matrix, const std::int64_t (&rows)[kAtOnce],
                           const float (&coefficients)[kAtOnce]) {
    Vector<T, kWidth> columns[kAtOnce][kParts] = {};
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
        if (kWhole || (rows[t] >= 0 && column(p) < dim))
          columns[t][p] = load_columns<T, kWidth>(row_of<T>(matrix, rows[t]) + column(p));
      }
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
#pragma unroll
      for (int p = 0; p < kParts; ++p) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i)
          sums[p][i] = fmaf(coefficients[t], as_float(columns[t][p].items[i]), sums[p][i]);
      }
    }
  }

  __device__ void write(void* matrix, std::int64_t row) const {
    T* out = static_cast<T*>(matrix) + row * dim;
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      if (column(p) >= dim) continue;
      Vector<T, kWidth> columns;
#pragma unroll
      for (int i = 0; i < kWidth; ++i) columns.items[i] = narrowed<T>(sums[p][i]);
      if constexpr (kWidth == 1) {
        out[column(p)] = columns.items[0];
      } else {
        store_once(out + column(p), columns);
      }
    }
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    add_weight_rows(TokenLogitsGradHidden args, std::int64_t strips) {
  const std::int64_t n = warp_of_grid() / strips;
  if (n >= args.n) return;
  Strip<T, kWidth> strip(warp_of_grid() % strips, args.dim);
  strip.add(args.weight, args.k, [&](std::int64_t k) {
    const std::int64_t pair = n * args.k + k, token = args.token_ids[pair];
    if (token >= 0 && token < args.vocab) return Term{token, args.grad[pair]};
    return Term{-1, token == -1 ? 0.0f : NAN};
  });
  strip.write(args.grad_hidden, n);
}

// Rows of the result that a block writes, and pairs from which on a row is left to all warps of the block.
constexpr int kRows = kWarp, kLong = 32;

// Most rows of a dense gradient are zeros, so a block has several, and a warp takes one after the other. Rows
// with many pairs come last: each warp adds a part of the pairs, and the parts are added in their order.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2)
    add_hidden_rows(TokenLogitsGradRows args, std::int64_t strips) {
  constexpr int kSums = Strip<T, kWidth>::kParts * kWidth;
  __shared__ float parts[kWarps][kSums][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const std::int64_t first_row = blockIdx.x / strips * kRows;
  const std::int64_t row = first_row + lane < args.rows ? first_row + lane : args.rows - 1;
  const std::int64_t lane_start = args.row_starts[row];
  const std::int64_t lane_count = first_row + lane < args.rows ? args.row_starts[row + 1] - lane_start : 0;
  Strip<T, kWidth> strip(blockIdx.x % strips, args.dim);
  const auto add = [&](std::int64_t start, std::int64_t count) {
    strip.clear();
    strip.add(args.hidden, count, [&](std::int64_t i) {
      const std::int64_t pair = args.pairs[start + i];
      return Term{pair / args.k, args.grad[pair]};
    });
  };

  for (int r = warp; r < kRows && first_row + r < args.rows; r += kWarps) {
    const std::int64_t count = __shfl_sync(kAllLanes, lane_count, r);
    if (count > kLong) continue;
    add(__shfl_sync(kAllLanes, lane_start, r), count);
    strip.write(args.grad_rows, first_row + r);
  }
  for (unsigned rest = __ballot_sync(kAllLanes, lane_count > kLong); rest; rest &= rest - 1) {
    const int r = __ffs(static_cast<int>(rest)) - 1;
    const std::int64_t start = __shfl_sync(kAllLanes, lane_start, r);
    const std::int64_t count = __shfl_sync(kAllLanes, lane_count, r), part = (count + kWarps - 1) / kWarps;
    const std::int64_t skipped = warp * part < count ? warp * part : count;
    add(start + skipped, part < count - skipped ? part : count - skipped);
#pragma unroll
    for (int i = 0; i < kSums; ++i) parts[warp][i][lane] = strip.sums[i / kWidth][i % kWidth];
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < kWarps; ++other) {
#pragma unroll
        for (int i = 0; i < kSums; ++i) strip.sums[i / kWidth][i % kWidth] += parts[other][i][lane];
      }
      strip.write(args.grad_rows, first_row + r);
    }
    __syncthreads();  // the parts of the next row come to the same place
  }
}

// body(type, width): 16 bytes at a time where every row that is read or written allows it.
template <class Body>
void for_strips(const Matrix& from, void* to, std::int64_t dim, DType dtype, const Body& body) {
  const bool aligned = is_aligned(from, dtype) && is_aligned(Matrix{to, dim}, dtype);
  for_dtype(dtype, [&](auto type) {
    using T = decltype(type);
    if (aligned) {
      body(type, std::integral_constant<int, kPerLoad<T>>());
    } else {
      body(type, std::integral_constant<int, 1>());
    }
  });
}

template <class T, int kWidth>
std::int64_t strips_of(std::int64_t dim) {
  return (dim + Strip<T, kWidth>::kColumns - 1) / Strip<T, kWidth>::kColumns;
}

}  // namespace

void token_logits(const TokenLogits& args, Stream stream) {
  const bool aligned = is_aligned(args.hidden, args.dtype) && is_aligned(args.weight, args.dtype);
  for_dtype(args.dtype, [&](auto type) {
    using T = decltype(type);
    launch(aligned ? dot_rows<T, true> : dot_rows<T, false>, blocks_for(args.n * args.k), dim3(kThreads), 0,
           stream, args);
  });
}

void token_logits_grad_hidden(const TokenLogitsGradHidden& args, Stream stream) {
  for_strips(args.weight, args.grad_hidden, args.dim, args.dtype, [&](auto type, auto width) {
    const std::int64_t strips = strips_of<decltype(type), width>(args.dim);
    launch(add_weight_rows<decltype(type), width>, blocks_for(args.n * strips), dim3(kThreads), 0, stream,
           args, strips);
  });
}

void token_logits_grad_rows(const TokenLogitsGradRows& args, Stream stream) {
  for_strips(args.hidden, args.grad_rows, args.dim, args.dtype, [&](auto type, auto width) {
    const std::int64_t strips = strips_of<decltype(type), width>(args.dim);
    const std::int64_t blocks = (args.rows + kRows - 1) / kRows * strips;
    launch(add_hidden_rows<decltype(type), width>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
           stream, args, strips);
  });
}

}  // namespace pyqe::cuda
