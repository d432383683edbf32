// Python has checked the op's contract; what stands here again is what a kernel would read wild memory without.
#include "group_arguments.h"

#include "common.h"

namespace twn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

class Reader {
 public:
  Reader(const char* op, const Tensor& x) : op_(op), x_(x) {}

  // A matrix of `rows` x `columns` whose rows lie anywhere; `name` and `index` go into messages.
  void matrix(const char* name, size_t index, const Tensor& t, int64_t rows, int64_t columns) const {
    require(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op_, ": ", name, "[", index, "] must be [", rows,
            ", ", columns, "], got ", shape_of(t), ".");
    require(columns <= 1 || rows == 0 || t.stride(1) == 1, op_, ": ", name, "[", index,
            "] must have a contiguous last dimension, got a stride of ", t.stride(1), ". Call contiguous().");
    alike(name, t);
  }

  void alike(const char* name, const Tensor& t) const {
    require(t.scalar_type() == x_.scalar_type(), op_, ": ", name, " must have the dtype of x; convert one of them.");
    placed(name, t);
  }

  void placed(const char* name, const Tensor& t) const {
    require(t.is_cuda() && t.get_device_index() == x_.get_device_index(), op_, ": ", name,
            " must be on the device of x; move it there.");
  }

 private:
  const char* op_;
  const Tensor& x_;
};

Adapter adapter(const Reader& reader, const char* names[2], size_t i, const Tensor& A, const Tensor& B, double scaling,
                int64_t out, int64_t in) {
  Adapter found;
  const int64_t rank = A.dim() == 2 ? A.size(0) : -1;
  if (rank == 0) return found;
  require(rank > 0 && rank <= kMaxRank, names[0], "[", i, "] must have a rank of 0 to ", kMaxRank, ", got ", shape_of(A), ".");
  reader.matrix(names[0], i, A, rank, in);
  reader.matrix(names[1], i, B, out, rank);
  found.a = A.data_ptr();
  found.b = B.data_ptr();
  found.a_pitch = A.stride(0);
  found.b_pitch = B.stride(0);
  found.rank = static_cast<int>(rank);
  found.scaling = static_cast<float>(scaling);
  return found;
}

int positive_int(const char* op, const char* name, int64_t value) {
  require(value >= 1 && value <= INT32_MAX / 2, op, ": ", name, " must be 1 to 2^30, got ", value, ".");
  return static_cast<int>(value);
}

void read_projections(const char* op, const Reader& reader, const GroupArguments& in, Group& group) {
  static const char* names[2][2] = {{"A_r", "B_r"}, {"A_e", "B_e"}};
  const size_t count = in.weights.size();
  require(count >= 1 && count <= kMaxProjections, op, ": weights must be 1 to 3 projections, got ", count, ".");
  for (const Tensors* list : {&in.biases, &in.A_r, &in.B_r, &in.A_e, &in.B_e}) {
    require(list->size() == count, op, ": every list must have one entry a projection (", count, "), got ", list->size(), ".");
  }
  require(in.scaling_r.size() == count && in.scaling_e.size() == count, op, ": scalings must have one entry a projection.");
  group.count = static_cast<int>(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& weight = in.weights[i];
    require(weight.dim() == 2, op, ": weights[", i, "] must be [out_features, in_features], got ", shape_of(weight), ".");
    reader.matrix("weights", i, weight, weight.size(0), group.in_features);
    Projection& projection = group.projections[i];
    projection.out_features = positive_int(op, "out_features", weight.size(0));
    projection.weight = weight.data_ptr();
    projection.pitch = weight.stride(0);
    require(projection.pitch % 8 == 0 && reinterpret_cast<uintptr_t>(projection.weight) % 16 == 0, op, ": weights[", i,
            "] must have rows that begin at multiples of 16 bytes, got a row stride of ", projection.pitch,
            " elements. Use another impl.");
    const Tensor& bias = in.biases[i];
    if (bias.numel() != 0) {
      require(bias.dim() == 1 && bias.size(0) == weight.size(0) && bias.is_contiguous(), op, ": biases[", i, "] must be a contiguous [",
              weight.size(0), "], got ", shape_of(bias), ".");
      reader.alike("biases", bias);
      projection.bias = bias.data_ptr();
    }
    projection.adapters[0] = adapter(reader, names[0], i, in.A_r[i], in.B_r[i], in.scaling_r[i], weight.size(0), group.in_features);
    projection.adapters[1] = adapter(reader, names[1], i, in.A_e[i], in.B_e[i], in.scaling_e[i], weight.size(0), group.in_features);
  }
}

void read_front(const char* op, const Reader& reader, const GroupArguments& in, Group& group) {
  require(!(in.gated && in.norm_weight.has_value()), op, ": norm_weight and gated exclude each other.");
  group.front = in.gated ? Front::kGated : in.norm_weight.has_value() ? Front::kNorm : Front::kPlain;
  if (group.front != Front::kNorm) return;
  const Tensor& weight = *in.norm_weight;
  require(weight.dim() == 1 && weight.size(0) == group.in_features && weight.is_contiguous(), op,
          ": norm_weight must be a contiguous [", group.in_features, "] (in_features), got ", shape_of(weight), ".");
  group.norm_is_wide = weight.scalar_type() == ScalarType::Float;
  group.norm_is_wide ? reader.placed("norm_weight", weight) : reader.alike("norm_weight", weight);
  group.norm_weight = weight.data_ptr();
  group.eps = static_cast<float>(in.eps);
}

void read_routes(const char* op, const Reader& reader, const GroupArguments& in, Group& group) {
  require(in.present >= 0 && in.present <= 3, op, ": present must be a bitmask of two adapters (0 to 3), got ", in.present, ".");
  int found = 0;
  for (int i = 0; i < group.count; ++i) {
    for (int a = 0; a < kAdapters; ++a) found |= (group.projections[i].adapters[a].rank > 0) << a;
  }
  group.present = static_cast<int>(in.present) & found;
  if (!in.routes.has_value()) return;
  const Tensor& routes = *in.routes;
  require(routes.dim() == 1 && routes.size(0) == group.tokens && routes.is_contiguous() && routes.scalar_type() == ScalarType::Char,
          op, ": routes must be a contiguous int8 [", group.tokens, "] (tokens), got ", shape_of(routes), ".");
  reader.placed("routes", routes);
  group.routes = static_cast<const int8_t*>(routes.data_ptr());
}

}  // namespace

MarshalledGroup marshal(const char* op, const GroupArguments& in) {
  const Tensor& x = in.x;
  require(x.is_cuda(), op, ": x must be on a CUDA device. Move it there with x.cuda(), or use another impl.");
  const bool half = x.scalar_type() == ScalarType::Half;
  require(half || x.scalar_type() == ScalarType::BFloat16, op, ": x must be float16 or bfloat16. Use another impl.");
  require(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1), op, ": x must be [tokens, features] with a contiguous last dimension, got ",
          shape_of(x), ".");
  const int64_t features = in.gated ? x.size(1) / 2 : x.size(1);
  require(features % 8 == 0 && (!in.gated || x.size(1) % 2 == 0), op, ": in_features must be a multiple of 8, got an x of ", shape_of(x),
          ". Use another impl.");
  const Reader reader(op, x);
  Group group;
  group.dtype = half ? Dtype::kFloat16 : Dtype::kBFloat16;
  group.tokens = positive_int(op, "tokens", x.size(0));
  group.in_features = positive_int(op, "in_features", features);
  group.x = x.data_ptr();
  group.x_pitch = x.stride(0);
  require(group.x_pitch % 8 == 0 && reinterpret_cast<uintptr_t>(group.x) % 16 == 0, op,
          ": x must have rows that begin at multiples of 16 bytes, got a row stride of ", group.x_pitch, " elements. Call x.contiguous().");
  read_projections(op, reader, in, group);
  read_front(op, reader, in, group);
  read_routes(op, reader, in, group);
  int64_t outputs = 0;
  for (int i = 0; i < group.count; ++i) outputs += group.projections[i].out_features;
  group.swiglu = in.swiglu;
  if (in.swiglu) {
    require(group.count == 2 && group.projections[0].out_features == group.projections[1].out_features, op,
            ": swiglu needs two projections of equal out_features.");
    outputs = group.projections[0].out_features;
  }
  if (in.residual.has_value()) {
    require(group.count == 1, op, ": residual goes with a single projection, got ", group.count, ".");
    reader.matrix("residual", 0, *in.residual, group.tokens, outputs);
    group.residual = in.residual->data_ptr();
    group.residual_pitch = in.residual->stride(0);
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), outputs});
  group.y = y.data_ptr();
  group.y_pitch = outputs;
  return {group, y};
}

}  // namespace twn
