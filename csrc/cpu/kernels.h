// What one instruction set offers: a table of functions, each computing a part of an operation on the calling
// thread, mostly the items [begin, end). A new level is one more table and one more line in dispatch.cpp.
#pragma once

#include "cpu/operations.h"
#include "cpu/scan.h"
#include "cpu/temperature.h"
#include "cpu/vocab_bce.h"

namespace pyqe::cpu {

struct Kernels {
  void (*token_logits_forward)(const TokenLogitsForward&, std::int64_t begin,
                               std::int64_t end);  // pairs (n, k)
  void (*token_logits_backward_hidden)(const TokenLogitsBackwardHidden&, std::int64_t begin,
                                       std::int64_t end);  // rows of grad_hidden
  void (*token_logits_backward_weight)(const TokenLogitsBackwardWeight&, std::int64_t begin,
                                       std::int64_t end);  // rows of grad_weight
  PanelShape (*panel_shape)(DType, std::int64_t dim);
  void (*pack_rows)(const Logits&, std::int64_t first_row, std::int64_t rows, std::int64_t begin,
                    std::int64_t end, float* packed);  // panels
  void (*scan)(const Scan&, std::int64_t row_begin, std::int64_t row_end, std::int64_t begin,
               std::int64_t end,
               int thread);  // segments
  void (*tile_logits)(const Logits&, std::int64_t first_id, std::int64_t count, const std::int64_t* rows,
                      std::int64_t n_rows, float* out);  // out [n_rows, kTile]
  void (*scaled_exp)(float* z, std::int64_t count, float base, float beta);
  VocabBceShape (*vocab_bce_shape)(DType, std::int64_t n, std::int64_t dim);
  void (*vocab_bce)(const VocabBcePass&, VocabBceWork, std::int64_t group, std::int64_t item);
  void (*inverse_softmax)(const InverseSoftmax&, std::int64_t begin, std::int64_t end);  // rows, fp32 only
  TemperatureSums (*temperature_nll)(const TemperatureNll&, std::int64_t begin, std::int64_t end);  // rows
};

extern const Kernels portable_kernels;
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
extern const Kernels avx512_bf16_kernels;
extern const Kernels amx_kernels;

}  // namespace pyqe::cpu
