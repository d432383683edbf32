// twn_cuda::gate_scores, pool_queries and front: one launch each.
#include "twn/small/launch.h"

#include <tuple>

#include "common.h"
#include "twn/runtime.h"
#include "workspace.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using namespace twn::small;

constexpr const char* kGate = "twn_cuda::gate_scores";
constexpr const char* kPool = "twn_cuda::pool_queries";
constexpr const char* kFront = "twn_cuda::front";

// Element counts stay far below 2^31, so that kernels may count tiles and columns in 32 bits.
int to_int(const char* op, const char* name, int64_t value) {
  twn::require(value >= 0 && value <= INT32_MAX / 4, op, ": ", name, " must be at most 2^29, got ", value, ".");
  return static_cast<int>(value);
}

Number number_of(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  const bool is_float = type == ScalarType::Float, is_half = type == ScalarType::Half;
  twn::require(is_float || is_half || type == ScalarType::BFloat16, op, ": ", name,
               " must be float32, float16 or bfloat16. Use another impl.");
  return is_float ? Number::kFloat32 : is_half ? Number::kFloat16 : Number::kBFloat16;
}

void require_on_device(const char* op, const char* name, const Tensor& tensor, const Tensor& first) {
  twn::require(tensor.is_cuda() && tensor.get_device_index() == first.get_device_index(), op, ": ", name,
               " must be on the CUDA device of the first argument. Move it there.");
}

void require_supported(const char* op, int device) {
  const int capability = twn::device_limits(device).capability;
  twn::require(capability >= 80, op, ": the GPU must have compute capability 8.0 or later, got ", capability / 10, ".",
               capability % 10, ". Use another impl.");
}

void require_started(const char* op, const char* failure) {
  twn::require(failure == nullptr, op, ": the kernel did not start: ", failure == nullptr ? "" : failure);
}

// [rows, vectors, width] with any strides; all vectors are read until told otherwise.
Pooled pooled(const char* op, const Tensor& states) {
  twn::require(states.is_cuda(), op, ": states must be on a CUDA device. Move them there with states.cuda(), or use another impl.");
  twn::require(states.dim() == 3 && states.size(1) > 0 && states.size(2) > 0, op,
               ": states must be [rows, vectors, width] with one vector or more, got ", twn::shape_of(states), ".");
  Pooled in;
  in.states = states.data_ptr();
  in.number = number_of(op, "states", states);
  in.row_stride = states.stride(0);
  in.vector_stride = states.stride(1);
  in.stride = states.stride(2);
  in.count = to_int(op, "vectors", states.size(1));
  in.width = to_int(op, "width", states.size(2));
  return in;
}

Tensor pool_queries(const Tensor& states, int64_t pooling, bool normalize) {
  Pool pool;
  pool.input = pooled(kPool, states);
  twn::require(pooling >= 0 && pooling <= 2, kPool, ": pooling must be 0 (mean), 1 (last) or 2 (first), got ", pooling, ".");
  if (pooling > 0) {
    pool.input.first = pooling == 1 ? pool.input.count - 1 : 0;
    pool.input.count = 1;
  }
  pool.rows = to_int(kPool, "rows", states.size(0));
  pool.normalize = normalize;
  const int32_t device = states.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_supported(kPool, device);
  Tensor out = torch::stable::new_empty(states, {states.size(0), states.size(2)}, ScalarType::Float);
  if (pool.rows == 0) return out;
  pool.out = static_cast<float*>(out.data_ptr());
  require_started(kPool, launch_pool(pool, twn::current_stream(device)));
  return out;
}

void read_step(GateStep& step, const Tensor& weight, const Tensor& bias, const Tensor& states, int width) {
  const bool is_linear = weight.dim() == 2;
  twn::require((is_linear || weight.dim() == 1) && weight.size(weight.dim() - 1) == width && weight.numel() > 0, kGate,
               ": a weight must be [out_features, ", width, "] or [", width, "], got ", twn::shape_of(weight), ".");
  twn::require(width == 1 || weight.stride(weight.dim() - 1) == 1, kGate,
               ": a weight must have a contiguous last dimension. Call contiguous().");
  require_on_device(kGate, "a weight", weight, states);
  const bool has_bias = bias.numel() > 0;
  step.kind = is_linear ? StepKind::kLinear : has_bias ? StepKind::kLayerNorm : StepKind::kRmsNorm;
  step.weight = weight.data_ptr();
  step.weight_number = number_of(kGate, "a weight", weight);
  step.in = width;
  step.out = to_int(kGate, "out_features", weight.size(0));
  step.pitch = is_linear ? weight.stride(0) : width;
  to_int(kGate, "the row stride of a weight", step.pitch);
  step.is_aligned = rows_are_aligned(step);
  if (!has_bias) return;
  twn::require(bias.dim() == 1 && bias.size(0) == step.out && bias.is_contiguous(), kGate, ": a bias must be a contiguous [", step.out,
               "], got ", twn::shape_of(bias), ".");
  require_on_device(kGate, "a bias", bias, states);
  step.bias = bias.data_ptr();
  step.bias_number = number_of(kGate, "a bias", bias);
}

Gate read_gate(const Tensor& states, const std::optional<Tensor>& last, const Tensors& weights, const Tensors& biases,
               const std::vector<int64_t>& activated, int64_t activation) {
  Gate gate;
  gate.inputs[0] = pooled(kGate, states);
  gate.rows = to_int(kGate, "rows", states.size(0));
  if (last.has_value()) {
    twn::require(last->dim() == 2 && last->size(0) == gate.rows && last->size(1) > 0, kGate, ": last must be [", gate.rows,
                 ", width], got ", twn::shape_of(*last), ".");
    require_on_device(kGate, "last", *last, states);
    Pooled& side = gate.inputs[1];
    side.states = last->data_ptr();
    side.number = number_of(kGate, "last", *last);
    side.row_stride = last->stride(0);
    side.stride = last->stride(1);
    side.width = to_int(kGate, "width", last->size(1));
  }
  const size_t count = weights.size();
  twn::require(count >= 1 && count <= kMaxSteps && biases.size() == count && activated.size() == count, kGate,
               ": weights, biases and activated must be 1 to ", kMaxSteps, " steps alike, got ", count, ", ", biases.size(), " and ",
               activated.size(), ".");
  twn::require(activation >= 0 && activation <= 4, kGate, ": activation must be 0 to 4, got ", activation, ".");
  gate.activation = static_cast<Activation>(activation);
  gate.count = static_cast<int>(count);
  int width = gate.inputs[0].width + gate.inputs[1].width;
  for (size_t i = 0; i < count; ++i) {
    read_step(gate.steps[i], weights[i], biases[i], states, width);
    gate.steps[i].activated = activated[i] != 0;
    width = gate.steps[i].out;
  }
  const GateStep& head = gate.steps[count - 1];
  twn::require(head.kind == StepKind::kLinear && head.out <= 2 && !head.activated, kGate,
               ": the last step must be linear with 1 or 2 outputs and without an activation, got a weight of ",
               twn::shape_of(weights[count - 1]), ".");
  return gate;
}

std::tuple<Tensor, Tensor> gate_scores(const Tensor& states, const std::optional<Tensor>& last, const Tensors& weights,
                                       const Tensors& biases, const std::vector<int64_t>& activated, int64_t activation,
                                       std::optional<double> threshold) {
  Gate gate = read_gate(states, last, weights, biases, activated, activation);
  const int32_t device = states.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_supported(kGate, device);
  Tensor scores = torch::stable::new_empty(states, {gate.rows}, ScalarType::Float);
  Tensor think = torch::stable::new_empty(states, {threshold.has_value() ? gate.rows : 0}, ScalarType::Bool);
  if (gate.rows == 0) return {scores, think};
  gate.scores = static_cast<float*>(scores.data_ptr());
  gate.think = threshold.has_value() ? static_cast<uint8_t*>(think.data_ptr()) : nullptr;
  gate.threshold = threshold.value_or(0.0);
  plan_gate(gate);
  void* stream = twn::current_stream(device);
  const int64_t buffer = gate.rows * gate.pitch;
  const twn::Workspace workspace =
      twn::acquire(states, stream, twn::Family::kGate, 2 * buffer * static_cast<int64_t>(sizeof(float)), kGateSyncWords);
  for (int i = 0; i < 2; ++i) gate.buffers[i] = static_cast<float*>(workspace.data) + i * buffer;
  require_started(kGate, launch_gate(gate, workspace.sync, workspace.report, device, stream));
  return {scores, think};
}

Tensor front(const Tensor& x, const std::optional<Tensor>& norm_weight, double eps, bool gated) {
  twn::require(x.is_cuda(), kFront, ": x must be on a CUDA device. Move it there with x.cuda(), or use another impl.");
  twn::require(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), kFront,
               ": x must be [tokens, features] with a contiguous last dimension, got ", twn::shape_of(x), ".");
  twn::require(gated != norm_weight.has_value(), kFront, ": either norm_weight or gated must be given, and not both.");
  twn::require(!gated || x.size(1) % 2 == 0, kFront, ": a gated x must hold gate and up side by side, got ", twn::shape_of(x), ".");
  FrontRows rows;
  rows.number = number_of(kFront, "x", x);
  twn::require(rows.number != Number::kFloat32, kFront, ": x must be float16 or bfloat16. Use another impl.");
  rows.x = x.data_ptr();
  rows.pitch = x.stride(0);
  rows.rows = to_int(kFront, "tokens", x.size(0));
  rows.features = to_int(kFront, "features", gated ? x.size(1) / 2 : x.size(1));
  if (norm_weight.has_value()) {
    const Tensor& weight = *norm_weight;
    twn::require(weight.dim() == 1 && weight.size(0) == rows.features && weight.is_contiguous(), kFront,
                 ": norm_weight must be a contiguous [", rows.features, "] (features of x), got ", twn::shape_of(weight), ".");
    require_on_device(kFront, "norm_weight", weight, x);
    const Number number = number_of(kFront, "norm_weight", weight);
    rows.norm_is_wide = number == Number::kFloat32;
    twn::require(rows.norm_is_wide || number == rows.number, kFront,
                 ": norm_weight must be float32 or have the dtype of x. Convert it.");
    rows.norm_weight = weight.data_ptr();
    rows.eps = static_cast<float>(eps);
  }
  const int32_t device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  require_supported(kFront, device);
  Tensor z = torch::stable::new_empty(x, {x.size(0), rows.features});
  if (z.numel() == 0) return z;
  rows.z = z.data_ptr();
  require_started(kFront, launch_front(rows, twn::current_stream(device)));
  return z;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(twn_cuda, m) {
  m.def("pool_queries(Tensor states, int pooling, bool normalize) -> Tensor");
  m.def("front(Tensor x, Tensor? norm_weight, float eps, bool gated) -> Tensor");
  m.def(
      "gate_scores(Tensor states, Tensor? last, Tensor[] weights, Tensor[] biases, int[] activated, int activation, "
      "float? threshold) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(twn_cuda, CompositeExplicitAutograd, m) {
  m.impl("pool_queries", TORCH_BOX(&pool_queries));
  m.impl("front", TORCH_BOX(&front));
  m.impl("gate_scores", TORCH_BOX(&gate_scores));
}
