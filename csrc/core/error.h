// Checks shared by every backend. The binding layer turns std::invalid_argument into ValueError and
// std::out_of_range into IndexError. Not for files with instruction-set flags: std::string is inlined code.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyqe {

inline void require_at_least(const char* name, std::int64_t value, std::int64_t minimum) {
  if (value >= minimum) return;
  throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(minimum) + " or more, got " +
                              std::to_string(value));
}

class TokenIdError : public std::out_of_range {
 public:
  TokenIdError(const char* name, std::int64_t row, std::int64_t column, std::int64_t token_id,
               std::int64_t vocab)
      : std::out_of_range(std::string(name) + "[" + std::to_string(row) + ", " + std::to_string(column) +
                          "]: expected -1 (padding) or a token id in [0, " + std::to_string(vocab) +
                          "), got " + std::to_string(token_id)) {}
};

}  // namespace pyqe
