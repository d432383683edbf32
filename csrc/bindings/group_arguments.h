// From the tensors of a registered op to the plain description that kernels take, with what must hold of them checked.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "twn/group.h"

namespace twn {

// As in the schema that decode_group and prefill_group share: twn_kernels/impl/cuda/loader.py states it.
struct GroupArguments {
  const torch::stable::Tensor& x;
  const std::optional<torch::stable::Tensor>& norm_weight;
  double eps;
  bool gated;
  const std::vector<torch::stable::Tensor>&weights, &biases, &A_r, &B_r, &A_e, &B_e;
  const std::vector<double>&scaling_r, &scaling_e;
  const std::optional<torch::stable::Tensor>& routes;
  int64_t present;
  bool swiglu;
  const std::optional<torch::stable::Tensor>& residual;
};

struct MarshalledGroup {
  Group group;
  torch::stable::Tensor y;  // allocated, not yet written
};

// `op` stands at the head of messages. Throws std::runtime_error with one sentence where memory would not be safe.
MarshalledGroup marshal(const char* op, const GroupArguments& arguments);

}  // namespace twn
