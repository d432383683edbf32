// From a Group to what the kernel is given. `Encode` makes the map of a matrix that bulk copies read boxes of.
#pragma once

#include "twn/prefill/block.h"

namespace twn::prefill {

// Rows of `columns` elements; a box has kBlockK columns. What a box has beyond the matrix reads as zeros.
struct Matrix {
  const void* data;
  int64_t columns, rows, pitch;
  int box_rows;
};

inline bool bulk_readable(const void* data, int64_t pitch) {
  return pitch % kAlignElements == 0 && reinterpret_cast<uintptr_t>(data) % kAlignBytes == 0;
}

// nullptr where the kernel can read every operand where it is, or may copy it (B); else which it cannot, and what to
// do.
inline const char* why_unreadable(const Group& group) {
  if (group.front != Front::kPlain) return "x must be ready to be multiplied; make it with twn_cuda::front first";
  if (!fits(group)) return "x has too many rows for one launch; call it for fewer at a time";
  if (!bulk_readable(group.x, group.x_pitch))
    return "rows of x must begin at multiples of 16 bytes; call x.contiguous()";
  for (int i = 0; i < group.count; ++i) {
    const Projection& projection = group.projections[i];
    if (!bulk_readable(projection.weight, projection.pitch)) {
      return "rows of a weight must begin at multiples of 16 bytes; give it memory of its own, or use another impl";
    }
    for (const Adapter& adapter : projection.adapters) {
      if (adapter.rank == 0 || bulk_readable(adapter.a, adapter.a_pitch)) continue;
      return "rows of an adapter's A must begin at multiples of 16 bytes; give it memory of its own, or use another "
             "impl";
    }
  }
  return nullptr;
}

// Fills `p`, whose maps are encode(map, Matrix); returns the first failure of `encode`.
template <typename Map, typename Encode>
const char* fill_params(Params<Map>& p, const Group& group, const Plan& plan, void* workspace, Encode encode) {
  const WorkspaceLayout layout = workspace_layout(group, plan);
  const char* failure = encode(p.x, Matrix{group.x, group.in_features, group.tokens, group.x_pitch, kBlockM});
  const auto add = [&](Map& map, const Matrix& matrix) {
    if (failure == nullptr) failure = encode(map, matrix);
  };
  if (plan.s_pitch() > 0) add(p.s, Matrix{workspace, plan.s_pitch(), group.tokens, plan.s_pitch(), kBlockM});
  for (int i = 0; i < group.count; ++i) {
    const Projection& projection = group.projections[i];
    const int out = projection.out_features;
    add(p.weights[i], Matrix{projection.weight, group.in_features, out, projection.pitch, plan.half()});
    p.bias[i] = projection.bias;
    p.y_in_pieces[i] = bulk_readable(static_cast<const uint16_t*>(group.y) + plan.y_column[i], group.y_pitch);
    for (int a = 0; a < kAdapters; ++a) {
      const Adapter& adapter = projection.adapters[a];
      if (plan.rank[i][a] == 0) continue;
      const bool copied = layout.b_offset[i][a] >= 0;
      const void* b = copied ? static_cast<const char*>(workspace) + layout.b_offset[i][a] : adapter.b;
      add(p.a[i][a], Matrix{adapter.a, group.in_features, adapter.rank, adapter.a_pitch, kSlot});
      add(p.b[i][a], Matrix{b, adapter.rank, out, copied ? copied_pitch(adapter.rank) : adapter.b_pitch, plan.half()});
      p.scaling[i][a] = adapter.scaling;
    }
  }
  p.plan = plan;
  p.routes = group.routes;
  p.present = group.present;
  p.residual = group.residual;
  p.residual_pitch = group.residual_pitch;
  p.residual_in_pieces = bulk_readable(group.residual, group.residual_pitch);
  p.s_data = workspace;
  p.y = group.y;
  p.y_pitch = group.y_pitch;
  return failure;
}

// One B that is copied to rows that bulk copies can read; `pitch` of the copy.
struct Copy {
  const uint16_t* source;
  uint16_t* target;
  int64_t source_pitch, rows, pitch;
  int rank;
};

// Fills `copies` and returns how many there are.
inline int list_copies(const Group& group, const Plan& plan, void* workspace,
                       Copy (&copies)[kMaxProjections * kAdapters]) {
  const WorkspaceLayout layout = workspace_layout(group, plan);
  int count = 0;
  for (int i = 0; i < group.count; ++i) {
    for (int a = 0; a < kAdapters; ++a) {
      if (layout.b_offset[i][a] < 0) continue;
      const Adapter& adapter = group.projections[i].adapters[a];
      char* target = static_cast<char*>(workspace) + layout.b_offset[i][a];
      copies[count++] = {static_cast<const uint16_t*>(adapter.b),
                         reinterpret_cast<uint16_t*>(target),
                         adapter.b_pitch,
                         plan.out_features[i],
                         copied_pitch(adapter.rank),
                         adapter.rank};
    }
  }
  return count;
}

// Element `index` of rows * rank. What the copy's rows have beyond stays as it is: no box reads more than `rank`
// columns.
TWN_HD void copy_element(const Copy& copy, int64_t index) {
  const int64_t row = index / copy.rank, column = index - row * copy.rank;
  copy.target[row * copy.pitch + column] = copy.source[row * copy.source_pitch + column];
}

}  // namespace twn::prefill
