// The scan over one instruction set; see scan.h.
#pragma once

#include "cpu/product.h"
#include "cpu/scan.h"
#include "cpu/scratch.h"
#include "cpu/vector_math.h"

namespace pyqe::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

// Calls body(vector) on z[0, count), the last vector filled up with -infinity, which no statistic counts.
template <class Isa, class Body>
__attribute__((always_inline)) inline void for_each_vector(const float* z, std::int64_t count,
                                                           const Body& body) {
  std::int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) body(load_vector<Isa>(z + i));
  if (i == count) return;
  float end[Isa::kWidth];
  for (int lane = 0; lane < Isa::kWidth; ++lane) end[lane] = i + lane < count ? z[i + lane] : -kInfinity;
  body(load_vector<Isa>(end));
}

// The largest number; NaN is passed over (the sums tell of it).
template <class Isa>
float largest_of(const float* z, std::int64_t count) {
  using F32 = typename Isa::F32;
  constexpr int kWidth = Isa::kWidth;
  F32 best[4];
  for (F32& b : best) b = broadcast<Isa>(-kInfinity);
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) best[j] = Isa::max(load_vector<Isa>(z + i + j * kWidth), best[j]);
  }
  for_each_vector<Isa>(z + i, count - i, [&](F32 v) { best[0] = Isa::max(v, best[0]); });
  return Isa::largest(Isa::max(Isa::max(best[0], best[1]), Isa::max(best[2], best[3])));
}

// Where a value that is there stands first.
template <class Isa>
std::int64_t find(const float* z, std::int64_t count, float value) {
  const typename Isa::F32 wanted = broadcast<Isa>(value);
  std::int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) {
    const unsigned equal = Isa::bits(load_vector<Isa>(z + i) == wanted);
    if (equal) return i + __builtin_ctz(equal);
  }
  while (z[i] != value) ++i;
  return i;
}

// --- accumulators ------------------------------------------------------------------------------------------

template <class Isa, bool kEntropy, bool kTempered>
void add_softmax(const float* z, std::int64_t count, float inverse_temperature, SoftmaxPartial& partial) {
  using F32 = typename Isa::F32;
  const F32 base = broadcast<Isa>(partial.max == -kInfinity ? 0.0f : partial.max);
  const F32 lowest = broadcast<Isa>(Isa::kLowestExponent), beta = broadcast<Isa>(inverse_temperature);
  F32 sum = {}, weighted = {}, tempered = {};
  for_each_vector<Isa>(z, count, [&](F32 v) {
    const F32 shifted = v - base, power = exp<Isa>(shifted);
    sum += power;
    if (kEntropy) weighted = Isa::fma(Isa::max(lowest, shifted), power, weighted);  // -infinity * 0 is NaN
    if (kTempered) tempered += exp<Isa>(shifted * beta);
  });
  partial.sum += static_cast<double>(Isa::sum(sum));
  if (kEntropy) partial.weighted += static_cast<double>(Isa::sum(weighted));
  if (kTempered) partial.tempered += static_cast<double>(Isa::sum(tempered));
}

template <class Isa>
void add_softmax(const Scan& scan, const float* z, std::int64_t count, std::int64_t first_id, float largest,
                 SoftmaxPartial& partial) {
  const float beta = scan.inverse_temperature;
  if (largest > partial.max) {
    rebase(partial, largest, beta);
    partial.argmax = first_id + find<Isa>(z, count, largest);
  }
  if (scan.entropy) {
    beta != 0 ? add_softmax<Isa, true, true>(z, count, beta, partial)
              : add_softmax<Isa, true, false>(z, count, beta, partial);
  } else {
    beta != 0 ? add_softmax<Isa, false, true>(z, count, beta, partial)
              : add_softmax<Isa, false, false>(z, count, beta, partial);
  }
}

template <class Isa>
void add_moments(const Scan& scan, const float* z, std::int64_t count, float largest,
                 MomentsPartial& partial) {
  using F32 = typename Isa::F32;
  if (largest > partial.max) rebase(partial, largest, scan.moments_beta);
  const F32 base = broadcast<Isa>(partial.max == -kInfinity ? 0.0f : partial.max);
  const F32 beta = broadcast<Isa>(scan.moments_beta), lowest = broadcast<Isa>(-__FLT_MAX__);
  F32 sum = {}, weighted = {}, squared = {};
  for_each_vector<Isa>(z, count, [&](F32 v) {
    const F32 shifted = v - base, power = exp<Isa>(shifted * beta);
    const F32 finite = Isa::max(lowest, shifted), term = finite * power;  // -infinity * 0 is NaN
    sum += power;
    weighted += term;
    squared = Isa::fma(finite, term, squared);
  });
  partial.sum += static_cast<double>(Isa::sum(sum));
  partial.weighted += static_cast<double>(Isa::sum(weighted));
  partial.squared += static_cast<double>(Isa::sum(squared));
}

template <class Isa>
void add_sigmoid(const Scan& scan, const float* z, std::int64_t count, std::int64_t first_id, float largest,
                 SigmoidPartial& partial) {
  using F32 = typename Isa::F32;
  if (largest > partial.max) {
    partial.max = largest;
    partial.argmax = first_id + find<Isa>(z, count, largest);
  }
  const F32 threshold = broadcast<Isa>(scan.threshold);
  F32 sum = {};
  typename Isa::I32 above = {};
  for_each_vector<Isa>(z, count, [&](F32 v) {
    sum += sigmoid<Isa>(v);
    above -= v > threshold;
  });
  partial.sum += static_cast<double>(Isa::sum(sum));
  partial.above += static_cast<std::int64_t>(Isa::sum(__builtin_convertvector(above, F32)));
}

inline void add_candidate(const Scan& scan, float logit, std::int64_t id, Candidates& list) {
  if (list.size == list.capacity) scan.make_room(scan, list);
  if (logit > list.floor) {
    list.items[list.size++] = {logit, static_cast<std::int32_t>(id)};
  } else if (logit > list.dropped) {
    list.dropped = logit;
  }
}

template <class Isa>
void add_candidates(const Scan& scan, const float* z, std::int64_t count, std::int64_t first_id,
                    float largest, Candidates& list) {
  using F32 = typename Isa::F32;
  if (!(largest > list.floor)) {  // nearly always, once a few thousand tokens have been seen
    if (largest > list.dropped) list.dropped = largest;
    return;
  }
  F32 dropped = broadcast<Isa>(list.dropped);
  const auto look_at = [&](F32 v, std::int64_t id) {
    const F32 floor = broadcast<Isa>(list.floor);
    dropped = Isa::max(v > floor ? dropped : v, dropped);
    for (unsigned above = Isa::bits(v > floor); above; above &= above - 1) {
      const int lane = __builtin_ctz(above);
      add_candidate(scan, v[lane], id + lane, list);
    }
  };
  std::int64_t i = 0;
  for (; i + 4 * Isa::kWidth <= count; i += 4 * Isa::kWidth) {  // most blocks of four hold none
    F32 v[4];
    for (int j = 0; j < 4; ++j) v[j] = load_vector<Isa>(z + i + j * Isa::kWidth);
    const F32 most = Isa::max(Isa::max(v[0], v[1]), Isa::max(v[2], Isa::max(v[3], dropped)));
    if (Isa::bits(most > list.floor) == 0) {
      dropped = most;
      continue;
    }
    for (int j = 0; j < 4; ++j) look_at(v[j], first_id + i + j * Isa::kWidth);
  }
  std::int64_t id = first_id + i;
  for_each_vector<Isa>(z + i, count - i, [&](F32 v) {
    look_at(v, id);
    id += Isa::kWidth;
  });
  const float most = Isa::largest(dropped);
  if (most > list.dropped) list.dropped = most;
}

// z[0, count) are the logits of tokens of one tile, from first_id on.
template <class Isa>
void add_tile(const Scan& scan, const float* z, std::int64_t count, std::int64_t first_id, TileSum& tile) {
  using F32 = typename Isa::F32;
  const float beta = scan.tile_beta, largest = largest_of<Isa>(z, count);
  if (first_id % kTile == 0) tile = {-kInfinity, 0};
  if (largest > tile.max) {
    if (tile.max != -kInfinity) {
      tile.sum *= static_cast<float>(__builtin_exp((static_cast<double>(tile.max) - largest) * beta));
    }
    tile.max = largest;
  }
  const F32 base = broadcast<Isa>(tile.max == -kInfinity ? 0.0f : tile.max);
  F32 sum = {};
  if (scan.factors) {
    const float* factor = scan.factors + first_id;
    std::int64_t rest = count;
    for_each_vector<Isa>(z, count, [&](F32 v) {
      F32 f = {};
      __builtin_memcpy(&f, factor,
                       static_cast<std::size_t>(rest < Isa::kWidth ? rest : Isa::kWidth) * sizeof(float));
      factor += Isa::kWidth, rest -= Isa::kWidth;
      sum = Isa::fma(f, exp<Isa>((v - base) * beta), sum);
    });
  } else {
    for_each_vector<Isa>(z, count, [&](F32 v) { sum += exp<Isa>((v - base) * beta); });
  }
  tile.sum += Isa::sum(sum);
}

// Logits z[0, count) of the tokens from first_id on, for one row (counted within the group).
template <class Isa>
void consume(const Scan& scan, const float* z, std::int64_t count, std::int64_t first_id, std::int64_t row,
             int thread) {
  const std::int64_t place = row * scan.segments + first_id / kSegment;
  const bool statistics = scan.softmax || scan.sigmoid || scan.moments || scan.keeper;
  const float largest = statistics ? largest_of<Isa>(z, count) : 0;
  if (scan.softmax) add_softmax<Isa>(scan, z, count, first_id, largest, scan.softmax_partials[place]);
  if (scan.sigmoid) add_sigmoid<Isa>(scan, z, count, first_id, largest, scan.sigmoid_partials[place]);
  if (scan.moments) add_moments<Isa>(scan, z, count, largest, scan.moments_partials[place]);
  if (scan.keeper) {
    Candidates& list = scan.lists[thread * scan.rows + row];
    if (scan.softmax && largest > list.floor) {
      const SoftmaxPartial& partial = scan.softmax_partials[place];
      scan.raise_floor(scan, list, partial.max, partial.sum);
      scan.raise_floor(scan, list, list.max, list.sum);
    }
    add_candidates<Isa>(scan, z, count, first_id, largest, list);
  }
  if (scan.tile_sums) {
    const std::int64_t tiles = (scan.logits.vocab + kTile - 1) / kTile;
    for (std::int64_t i = 0; i < count; i += kTile) {
      const std::int64_t size = count - i < kTile ? count - i : kTile, id = first_id + i;
      add_tile<Isa>(scan, z + i, size, id, scan.tile_sums[row * tiles + id / kTile]);
    }
  }
  if (scan.copy) {
    __builtin_memcpy(scan.copy + (scan.first_row + row) * scan.logits.vocab + first_id, z,
                     static_cast<std::size_t>(count) * sizeof(float));
  }
  const std::int64_t* ids = scan.token_ids + (scan.first_row + row) * scan.n_tokens;
  float* token_logits = scan.token_logits + (scan.first_row + row) * scan.n_tokens;
  for (std::int64_t k = 0; k < scan.n_tokens; ++k) {
    if (ids[k] >= first_id && ids[k] < first_id + count) token_logits[k] = z[ids[k] - first_id];
  }
}

inline void start_segment(const Scan& scan, std::int64_t row, std::int64_t segment) {
  const std::int64_t place = row * scan.segments + segment;
  if (scan.softmax) clear(scan.softmax_partials[place]);
  if (scan.sigmoid) clear(scan.sigmoid_partials[place]);
  if (scan.moments) clear(scan.moments_partials[place]);
}

// The list of the thread learns what the segment adds to the softmax of the row.
inline void end_segment(const Scan& scan, std::int64_t row, std::int64_t segment, int thread) {
  if (!scan.keeper || !scan.softmax) return;
  const SoftmaxPartial& partial = scan.softmax_partials[row * scan.segments + segment];
  if (partial.max == -kInfinity) return;
  Candidates& list = scan.lists[thread * scan.rows + row];
  const double apart = __builtin_exp(-__builtin_fabs(static_cast<double>(list.max) - partial.max));
  list.sum = partial.max > list.max ? list.sum * apart + partial.sum : list.sum + partial.sum * apart;
  list.max = partial.max > list.max ? partial.max : list.max;
}

// --- where logits come from --------------------------------------------------------------------------------

// What is done to the products of one row; see Logits.
template <class Isa>
void transform(const Logits& from, std::int64_t row, const float* bias, float* z, std::int64_t count) {
  using F32 = typename Isa::F32;
  const float scale = from.row_scale ? from.scale * from.row_scale[row] : from.scale;
  const float shift = from.row_shift ? from.row_shift[row] : 0;
  if (scale == 1 && shift == 0 && !bias && from.softcap == 0) return;
  const F32 factor = broadcast<Isa>(scale), offset = broadcast<Isa>(shift);
  for (std::int64_t i = 0; i < count; i += Isa::kWidth) {  // the buffers are whole vectors long
    F32 v = load_vector<Isa>(z + i) * factor;
    if (bias) v += load_vector<Isa>(bias + i);
    v += offset;
    if (from.softcap != 0) v = tanh<Isa>(v / from.softcap) * from.softcap;
    __builtin_memcpy(z + i, &v, sizeof v);
  }
}

template <class T>
void scaled_bias(const Logits& from, std::int64_t first_id, std::int64_t count, float* bias) {
  const T* values = static_cast<const T*>(from.bias) + first_id;
  for (std::int64_t i = 0; i < count; ++i) bias[i] = from.scale * to_float(values[i]);
}

// How many columns are multiplied at a time: their packed weights stay in the second-level cache.
template <class Product>
std::int64_t chunk_columns(std::int64_t depth) {
  constexpr std::int64_t kBytes = Product::kRows > 16 ? 1024 * 1024 : 512 * 1024;
  std::int64_t columns = kTile / 8;
  while (columns < kSegment && 2 * columns * depth * 4 <= kBytes) columns *= 2;
  return columns;
}

// Logits of up to `columns` tokens, whose weights and bias `load` takes, for panels of packed rows.
template <class Isa, class T>
struct LinearTile {
  using Product = typename ProductOf<Isa, T>::Type;
  const Logits& from;
  std::int64_t more;  // floats of memory that the caller wants, at `rest`
  typename Product::Session session = {};
  std::int64_t depth = Product::depth(from.dim);
  std::int64_t columns = chunk_columns<Product>(depth);
  float* packed = scratch(columns * depth + (Product::kRows + 1) * columns + more);
  float* products = packed + columns * depth;
  float* bias = products + Product::kRows * columns;
  float* rest = bias + columns;

  void load(std::int64_t first_id, std::int64_t count) {
    for (std::int64_t c = 0; c < count; c += Product::kColumns) {
      Product::pack_columns({&from.weight, nullptr, first_id + c}, count - c, from.dim, packed + c * depth);
    }
    if (from.bias) scaled_bias<T>(from, first_id, count, bias);
  }

  // The bare products of a panel of rows, in `products`.
  void multiply(const float* panel, std::int64_t rows, std::int64_t count) {
    for (std::int64_t c = 0; c < count; c += Product::kColumns) {
      Product::multiply(rows, panel, packed + c * depth, depth, products + c, columns);
    }
  }

  // Calls consume_row(r, z) with the logits of every row of a panel, whose rows are first_row + r, or
  // list[first_row + r].
  template <class Consume>
  void multiply(const float* panel, std::int64_t rows, std::int64_t count, const std::int64_t* list,
                std::int64_t first_row, const Consume& consume_row) {
    multiply(panel, rows, count);
    for (std::int64_t r = 0; r < rows; ++r) {
      float* z = products + r * columns;
      transform<Isa>(from, list ? list[first_row + r] : first_row + r, from.bias ? bias : nullptr, z, count);
      consume_row(r, z);
    }
  }
};

// The corrected logits of one row and the tokens of a chunk, whose factors are packed as columns of a
// product.
template <class Isa>
struct CorrectionTile {
  using Product = BroadcastProduct<Isa, float, SingleWords<Isa, float>>;
  const Correction& correction;
  float* corrected;
  float* packed;

  static std::int64_t floats(std::int64_t rank, std::int64_t columns) { return columns * (rank + 1); }

  CorrectionTile(const Correction& of, std::int64_t columns, float* memory)
      : correction(of), corrected(memory), packed(memory + columns) {}

  void load(std::int64_t first_id, std::int64_t count) {
    for (std::int64_t c = 0; correction.rank > 0 && c < count; c += Product::kColumns) {
      Product::pack_columns({&correction.factors, nullptr, first_id + c}, count - c, correction.rank,
                            packed + c * correction.rank);
    }
  }

  const float* correct(std::int64_t row, std::int64_t first_id, const float* z, std::int64_t count) {
    using F32 = typename Isa::F32;
    const std::int64_t rank = correction.rank;
    const float* weights = correction.projected + row * rank;
    const F32 scale = broadcast<Isa>(correction.scale[row]), shift = broadcast<Isa>(correction.shift[row]);
    for (std::int64_t c = 0; c < count; c += Product::kColumns) {
      F32 sums[2] = {Isa::fma(load_vector<Isa>(z + c), scale, shift),
                     Isa::fma(load_vector<Isa>(z + c + Isa::kWidth), scale, shift)};
      const float* factors = packed + c * rank;
      for (std::int64_t k = 0; k < rank; ++k, factors += Product::kColumns) {
        const F32 weight = broadcast<Isa>(weights[k]);
        sums[0] = Isa::fma(weight, load_vector<Isa>(factors), sums[0]);
        sums[1] = Isa::fma(weight, load_vector<Isa>(factors + Isa::kWidth), sums[1]);
      }
      __builtin_memcpy(corrected + c, sums, sizeof sums);
    }
    for (std::int64_t i = 0; correction.bias && i < count; ++i) corrected[i] += correction.bias[first_id + i];
    return corrected;
  }
};

template <class Isa, class T>
void scan_linear(const Scan& scan, std::int64_t segment, int thread) {
  using Tile = LinearTile<Isa, T>;
  constexpr std::int64_t kRows = Tile::Product::kRows;
  const Scan* second = scan.second;
  Tile tile{scan.logits, second ? CorrectionTile<Isa>::floats(scan.correction.rank, kSegment) : 0};
  CorrectionTile<Isa> correction{scan.correction, tile.columns, tile.rest};
  const std::int64_t first = segment * kSegment;
  const std::int64_t last = first + kSegment < scan.logits.vocab ? first + kSegment : scan.logits.vocab;
  for (std::int64_t row = 0; row < scan.rows; ++row) {
    start_segment(scan, row, segment);
    if (second) start_segment(*second, row, segment);
  }
  for (std::int64_t id = first; id < last; id += tile.columns) {
    const std::int64_t count = last - id < tile.columns ? last - id : tile.columns;
    tile.load(id, count);
    if (second) correction.load(id, count);
    for (std::int64_t row = 0; row < scan.rows; row += kRows) {
      const std::int64_t rows = scan.rows - row < kRows ? scan.rows - row : kRows;
      tile.multiply(scan.packed_rows + row * tile.depth, rows, count, nullptr, scan.first_row + row,
                    [&](std::int64_t r, const float* z) {
                      consume<Isa>(scan, z, count, id, row + r, thread);
                      if (!second) return;
                      z = correction.correct(scan.first_row + row + r, id, z, count);
                      consume<Isa>(*second, z, count, id, row + r, thread);
                    });
    }
  }
  for (std::int64_t row = 0; row < scan.rows; ++row) {
    end_segment(scan, row, segment, thread);
    if (second) end_segment(*second, row, segment, thread);
  }
}

template <class Isa>
const float* as_floats(const float* from, std::int64_t, float*) {
  return from;
}

template <class Isa, class T>
const float* as_floats(const T* from, std::int64_t count, float* buffer) {
  widen<Isa>(from, count, buffer);
  return buffer;
}

template <class Isa, class T>
void scan_row(const Scan& scan, std::int64_t row, std::int64_t segment, int thread) {
  const Matrix& logits = scan.logits.logits;
  const T* from = static_cast<const T*>(logits.data) + (scan.first_row + row) * logits.stride;
  const std::int64_t first = segment * kSegment, rest = scan.logits.vocab - first;
  const std::int64_t count = rest < kSegment ? rest : kSegment;
  float buffer[kSegment];
  start_segment(scan, row, segment);
  consume<Isa>(scan, as_floats<Isa>(from + first, count, buffer), count, first, row, thread);
  end_segment(scan, row, segment, thread);
}

// Segments [begin, end) of the rows [row_begin, row_end) of the group; of all its rows where logits are
// computed.
template <class Isa>
void scan_segments(const Scan& scan, std::int64_t row_begin, std::int64_t row_end, std::int64_t begin,
                   std::int64_t end, int thread) {
  with_element_type(scan.logits.dtype, [&](auto element) {
    using T = decltype(element);
    if (!scan.logits.logits.data) {
      for (std::int64_t s = begin; s < end; ++s) scan_linear<Isa, T>(scan, s, thread);
      return;
    }
    for (std::int64_t row = row_begin; row < row_end; ++row) {
      for (std::int64_t s = begin; s < end; ++s) scan_row<Isa, T>(scan, row, s, thread);
    }
  });
}

// Logits of the tokens [first_id, first_id + count), at most a tile, for the listed rows: out [rows, kTile].
template <class Isa>
void tile_logits(const Logits& from, std::int64_t first_id, std::int64_t count, const std::int64_t* list,
                 std::int64_t rows, float* out) {
  with_element_type(from.dtype, [&](auto element) {
    using T = decltype(element);
    if (from.logits.data) {
      const Rows source = {&from.logits, list, 0};
      for (std::int64_t r = 0; r < rows; ++r) widen<Isa>(source.at<T>(r) + first_id, count, out + r * kTile);
      return;
    }
    using Product = typename LinearTile<Isa, T>::Product;
    LinearTile<Isa, T> tile{from, Product::kRows * Product::depth(from.dim)};
    for (std::int64_t done = 0; done < count; done += tile.columns) {
      const std::int64_t columns = count - done < tile.columns ? count - done : tile.columns;
      tile.load(first_id + done, columns);
      for (std::int64_t row = 0; row < rows; row += Product::kRows) {
        const std::int64_t some = rows - row < Product::kRows ? rows - row : Product::kRows;
        Product::pack_rows({&from.hidden, list, row}, some, from.dim, tile.rest);
        tile.multiply(tile.rest, some, columns, list, row, [&](std::int64_t r, const float* z) {
          __builtin_memcpy(out + (row + r) * kTile + done, z,
                           static_cast<std::size_t>(columns) * sizeof(float));
        });
      }
    }
  });
}

// z = e^((z - base) beta)
template <class Isa>
void scaled_exp(float* z, std::int64_t count, float base, float beta) {
  std::int64_t i = 0;
  for (; i + Isa::kWidth <= count; i += Isa::kWidth) {
    const typename Isa::F32 v = exp<Isa>((load_vector<Isa>(z + i) - base) * beta);
    __builtin_memcpy(z + i, &v, sizeof v);
  }
  if (i == count) return;
  float end[Isa::kWidth] = {};
  const std::size_t rest = static_cast<std::size_t>(count - i) * sizeof(float);
  __builtin_memcpy(end, z + i, rest);
  const typename Isa::F32 v = exp<Isa>((load_vector<Isa>(end) - base) * beta);
  __builtin_memcpy(z + i, &v, rest);
}

// --- packed rows -------------------------------------------------------------------------------------------

// Calls body with a value of the type that multiplies elements of this dtype.
template <class Isa, class Body>
void with_product(DType dtype, const Body& body) {
  with_element_type(dtype, [&](auto element) { body(typename ProductOf<Isa, decltype(element)>::Type{}); });
}

template <class Isa>
PanelShape panel_shape(DType dtype, std::int64_t dim) {
  PanelShape shape = {1, 0};
  with_product<Isa>(dtype, [&](auto product) { shape = {decltype(product)::kRows, product.depth(dim)}; });
  return shape;
}

// Panels [begin, end) of the rows [first_row, first_row + count).
template <class Isa>
void pack_rows(const Logits& from, std::int64_t first_row, std::int64_t count, std::int64_t begin,
               std::int64_t end, float* packed) {
  with_product<Isa>(from.dtype, [&](auto product) {
    constexpr std::int64_t kRows = decltype(product)::kRows;
    const std::int64_t size = kRows * product.depth(from.dim);
    for (std::int64_t panel = begin; panel < end; ++panel) {
      const std::int64_t row = panel * kRows, rest = count - row;
      product.pack_rows({&from.hidden, nullptr, first_row + row}, rest < kRows ? rest : kRows, from.dim,
                        packed + panel * size);
    }
  });
}

}  // namespace
}  // namespace pyqe::cpu
