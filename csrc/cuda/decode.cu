// Dot products of up to 64 rows of hidden with every row of weight, which is read once.
//
// All of weight comes through here (1 GB for a vocabulary of 128256 and 4096 dimensions), so the time is that
// of reading it. A block owns 192 vocabulary rows and walks along them 64 elements, 128 bytes, at a time;
// hidden is walked along with them. Both go to shared memory by asynchronous copies, in a ring of stages:
// while one is multiplied, the copies of the next ones are under way. How many bytes are in flight then
// follows from the constants below and not from how the compiler allots registers: docs/notes/gpu-decode.md
// has the arithmetic.
//
// The tensor cores multiply: 16 vocabulary rows are the left operand, 8 tokens the right one. A thread of a
// warp wants, of 16 consecutive k, the pairs 2t, 2t + 1 and 2t + 8, 2t + 9 of rows g and g + 8, with lane = 4
// g + t. Which k of memory these are is ours to choose, if it is the same for both operands: the thread takes
// the eight consecutive k from 8 t on out of 32, one load of 16 bytes a row, whose halves feed two products.
//
// A dot is one chain of products over all k, padded with zeros to a multiple of 64, in one order whatever the
// number of tokens: its bits do not depend on what other rows are in the call.
#include "cuda/decode.h"
#include "cuda/tensor_core.h"

namespace pyqe::cuda {
namespace {

constexpr int kWarps = 6, kThreads = kWarps * kWarp;
constexpr int kRowTiles = 2;  // of 16 vocabulary rows each, for a warp: they share the fragments of hidden
constexpr int kWarpRows = kRowTiles * 16, kRows = kWarps * kWarpRows;
constexpr int kPieces = 8;           // of 16 bytes, of a row in a stage
constexpr int kDepth = kPieces * 8;  // elements of a row in a stage
constexpr int kStages = 3;           // one is multiplied, two are copied

// Where a piece of a row is in a stage. Odd rows have their halves exchanged: the eight threads that are
// served at once, whether they write a row or read half of two rows, then use all the banks.
__device__ unsigned place(unsigned row, unsigned piece) { return row * kPieces + (piece ^ row % 2 * 4); }

// A thread's share of copying rows of a matrix into stages: the same piece of every kRowStep-th row.
constexpr int kRowStep = kThreads / kPieces;
static_assert(kRowStep % 2 == 0, "place() of a thread's rows differs by whole rows");

template <int kTileRows, class T>
struct RowCopies {
  const T* from;      // its piece of its first row
  std::int64_t step;  // from there to its next row, in elements
  std::int64_t dim;   // elements of a row from the piece on
  std::int64_t rows;  // of the matrix from its first row on
  unsigned to;        // the piece in a stage
  CachePolicy policy;

  __device__ RowCopies(const Matrix& matrix, std::int64_t first_row, std::int64_t n, std::int64_t dim,
                       CachePolicy policy)
      : step(matrix.stride * kRowStep), policy(policy) {
    const unsigned row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    from = static_cast<const T*>(matrix.data) + (first_row + row) * matrix.stride + piece * 8;
    rows = n - first_row - row;
    this->dim = dim - piece * 8;
    to = place(row, piece);
  }

  // Elements from `start` on; zeros beyond the matrix, which is not read there.
  __device__ void copy(std::int64_t start, uint4* stage) const {
#pragma unroll
    for (int i = 0; i * kRowStep < kTileRows; ++i) {
      if ((i + 1) * kRowStep > kTileRows && threadIdx.x / kPieces + i * kRowStep >= kTileRows) break;
      copy_async(&stage[to + i * kRowStep * kPieces], from + start + i * step,
                 i * kRowStep < rows && start < dim, policy);
    }
  }
};

// Adds a stage's part of the dots of a warp's vocabulary rows with all tokens.
template <class T, int kTokenTiles>
__device__ void multiply(float (&acc)[kRowTiles][kTokenTiles][4], const uint4* weight, const uint4* hidden) {
  const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const unsigned at = place(g, half * 4 + t);  // as for every row that is an even number away
    uint4 upper[kRowTiles], lower[kRowTiles];    // rows g and g + 8 of the tile
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      upper[i] = weight[at + i * 16 * kPieces];
      lower[i] = weight[at + (i * 16 + 8) * kPieces];
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const uint4 token = hidden[at + tile * 8 * kPieces];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        mma_16816(acc[i][tile], {upper[i].x, lower[i].x, upper[i].y, lower[i].y}, {token.x, token.y}, T());
        mma_16816(acc[i][tile], {upper[i].z, lower[i].z, upper[i].w, lower[i].w}, {token.z, token.w}, T());
      }
    }
  }
}

template <int kTokenTiles>
__device__ void store(const float (&acc)[kRowTiles][kTokenTiles][4], const Decode& args,
                      std::int64_t first_row) {
  const unsigned lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::int64_t token = tile * 8 + t * 2 + j % 2, row = first_row + i * 16 + g + j / 2 * 8;
        if (token < args.n && row < args.vocab) args.dots[token * args.vocab + row] = acc[i][tile][j];
      }
    }
  }
}

template <int kTokenTiles>
constexpr int kStageRows = kRows + kTokenTiles * 8;  // of weight, then of hidden

template <class T, int kTokenTiles>
__global__ void __launch_bounds__(kThreads, 2) decode_rows(Decode args) {
  constexpr int kStage = kStageRows<kTokenTiles> * kPieces;
  uint4* ring = dynamic_shared<uint4>();
  const std::int64_t first_row = std::int64_t{blockIdx.x} * kRows;
  const RowCopies<kRows, T> weight(args.weight, first_row, args.vocab, args.dim, evict_first());
  const RowCopies<kTokenTiles * 8, T> hidden(args.hidden, 0, args.n, args.dim, evict_normal());
  const auto fill = [&](std::int64_t start, int stage) {
    if (start < args.dim) {
      weight.copy(start, ring + stage * kStage);
      hidden.copy(start, ring + stage * kStage + kRows * kPieces);
    }
    commit_copies();  // an empty group too, so that groups can be counted
  };
  const unsigned warp_row = threadIdx.x / kWarp * kWarpRows;
  float acc[kRowTiles][kTokenTiles][4] = {};
  for (int stage = 0; stage < kStages - 1; ++stage) fill(stage * kDepth, stage);
  int full = 0, free = kStages - 1;
  for (std::int64_t start = 0; start < args.dim; start += kDepth) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one before it
    fill(start + (kStages - 1) * kDepth, free);
    const uint4* stage = ring + full * kStage;
    if (first_row + warp_row < args.vocab)
      multiply<T>(acc, stage + warp_row * kPieces, stage + kRows * kPieces);
    free = full;
    full = full + 1 == kStages ? 0 : full + 1;
  }
  store(acc, args, first_row + warp_row);
}

template <class T, int kTokenTiles>
void start(const Decode& args, Stream stream) {
  const auto blocks = static_cast<unsigned>((args.vocab + kRows - 1) / kRows);
  const std::size_t shared = kStages * kStageRows<kTokenTiles> * kPieces * sizeof(uint4);
  launch(decode_rows<T, kTokenTiles>, dim3(blocks), dim3(kThreads), shared, stream, args);
}

template <class T>
void start(const Decode& args, Stream stream) {
  if (args.n <= 8) return start<T, 1>(args, stream);
  if (args.n <= 16) return start<T, 2>(args, stream);
  if (args.n <= 32) return start<T, 4>(args, stream);
  return start<T, 8>(args, stream);
}

}  // namespace

void decode(const Decode& args, Stream stream) {
  if (args.n > kMaxDecodeRows) throw std::invalid_argument("hidden: expected no more than 64 rows");
  if (args.n == 0) return;
  if (args.dtype == DType::kBFloat16) return start<BFloat16>(args, stream);
  if (args.dtype == DType::kFloat16) return start<Float16>(args, stream);
  throw std::invalid_argument("dtype: expected bfloat16 or float16");
}

}  // namespace pyqe::cuda
