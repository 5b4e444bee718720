// Where the rows of a tensor begin, for tensors of any rank and strides: the outer dimensions, folded to at most four.
// fastlm/ops/rows.py makes these.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace fastlm {

constexpr int kMaxRowDims = 4;

// Four numbers, outermost first.
struct Four {
  int64_t at[kMaxRowDims];
};

struct Rows {
  Four sizes;  // 1 after the first where all dimensions fold into one

  FASTLM_HOST_DEVICE int64_t count() const { return sizes.at[0] * sizes.at[1] * sizes.at[2] * sizes.at[3]; }

  FASTLM_HOST_DEVICE bool folded() const { return sizes.at[1] * sizes.at[2] * sizes.at[3] == 1; }

  // Elements from the tensor's first to the first of `row`.
  FASTLM_HOST_DEVICE int64_t offset(int64_t row, const Four& strides) const {
    if (folded()) return row * strides.at[0];
    int64_t offset = 0;
    for (int d = kMaxRowDims - 1; d > 0; --d) {
      offset += row % sizes.at[d] * strides.at[d];
      row /= sizes.at[d];
    }
    return offset + row * strides.at[0];
  }
};

}  // namespace fastlm
