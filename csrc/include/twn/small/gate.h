// The gate in one launch: pool, a small MLP, a sigmoid, a threshold, for a batch of rows. Plan and block program.
//
// The work is a row of stages, each cut into tasks: a stage of rows pools or normalises, a stage of a linear layer gives
// each task a tile of output features, so that the whole grid streams the weights. Tasks are drawn by ticket in the order
// of the stages; a task waits until every task of the stage before is done (flags.h), and asks for its weights meanwhile.
// Between stages a batch stands in fp32 in one of two buffers: who writes one knows that its readers are done.
#pragma once

#include "twn/flags.h"
#include "twn/small/pool.h"

namespace twn::small {

constexpr int kMaxSteps = 16;
constexpr int kMaxStages = kMaxSteps + 1;  // one to pool, then at most one a step
constexpr int kGateWarps = 8;
constexpr int kGateThreads = kGateWarps * kWarpLanes;
constexpr int kPartChunks = 2 * kGateThreads;  // of a row that is only pooled, what one task takes
constexpr uint32_t kGateReport = 0x47415445;   // "GATE"

constexpr float kLayerNormEps = 1e-5f;  // of impl/reference/gate.py
constexpr float kRmsNormEps = 1e-6f;

enum class StepKind : int { kLinear = 0, kLayerNorm = 1, kRmsNorm = 2 };
enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3, kTanh = 4 };

struct GateStep {
  const void* weight = nullptr;  // [out, in] of a linear layer, [in] of a norm
  const void* bias = nullptr;    // [out], or none
  int64_t pitch = 0;             // elements from row to row of the weight
  int in = 0;
  int out = 0;
  StepKind kind = StepKind::kLinear;
  Number weight_number = Number::kFloat32;
  Number bias_number = Number::kFloat32;
  bool activated = false;
  bool is_aligned = false;  // every row of the weight begins at a multiple of 16 bytes
};

struct GateStage {
  int first = 0;  // of the steps; a stage of rows has `steps` norms, or none where it only pools
  int steps = 0;
  bool is_linear = false;
  int tiles = 0;          // of output features, or parts of a row
  int tile_features = 0;  // output features of a tile; chunks of a part
  int tile_rows = 0;
  uint32_t first_task = 0;
  uint32_t tasks = 0;
};

struct Gate {
  Pooled inputs[2];  // side by side; the second may be 0 wide
  int rows = 0;
  GateStep steps[kMaxSteps];
  int count = 0;
  Activation activation = Activation::kGelu;
  GateStage stages[kMaxStages];
  int stage_count = 0;
  uint32_t tasks = 0;
  float* buffers[2] = {nullptr, nullptr};  // [rows, pitch], 16-byte aligned
  int64_t pitch = 0;
  float* scores = nullptr;   // [rows]
  uint8_t* think = nullptr;  // [rows], or none: 1 where the score is `threshold` or more
  double threshold = 0.0;
};

// For GateStep::is_aligned.
TWN_HD bool rows_are_aligned(const GateStep& step) {
  const int64_t size = step.weight_number == Number::kFloat32 ? 4 : 2;
  return is_aligned(step.weight) && (step.out == 1 || step.pitch * size % static_cast<int64_t>(sizeof(Words)) == 0);
}

// What one warp takes of a linear layer: `features` x `rows` sums, each read once for the other's sake.
struct WarpTile {
  int features;
  int rows;
};

TWN_HD WarpTile warp_tile(int rows) { return rows == 1 ? WarpTile{1, 1} : rows <= 4 ? WarpTile{2, 4} : WarpTile{3, 4}; }

constexpr WarpTile kLastTile = {2, 1};  // of the logits: one warp has both of a row

// Slots of the launch's words: arrivals of a stage's tasks, then the tag that says all of them are done.
TWN_HD int arrival_slot(int stage) { return 2 * stage; }
TWN_HD int done_slot(int stage) { return 2 * stage + 1; }
constexpr int kGateSyncWords = kFirstFreeWord + 2 * kMaxStages;

TWN_HD void add_stage(Gate& gate, GateStage stage, int row_tiles) {
  stage.first_task = gate.tasks;
  stage.tasks = static_cast<uint32_t>(stage.tiles) * static_cast<uint32_t>(row_tiles);
  gate.tasks += stage.tasks;
  gate.stages[gate.stage_count++] = stage;
}

// Stages and pitch of a gate whose inputs, rows and steps are filled in.
TWN_HD void plan_gate(Gate& gate) {
  gate.stage_count = 0;
  gate.tasks = 0;
  const int chunks = chunks_of(gate.inputs[0].width) + chunks_of(gate.inputs[1].width);
  int widest = gate.inputs[0].width + gate.inputs[1].width;
  int step = 0;
  while (step < gate.count || gate.stage_count == 0) {
    GateStage stage;
    stage.first = step;
    if (gate.stage_count == 0 || gate.steps[step].kind != StepKind::kLinear) {
      while (step < gate.count && gate.steps[step].kind != StepKind::kLinear) ++step;
      stage.steps = step - stage.first;
      // A norm must see the whole row; a row that is only pooled is cut, or few rows would leave most of the GPU idle.
      stage.tile_features = stage.steps > 0 ? chunks : smaller(chunks, kPartChunks);
      stage.tiles = stage.steps > 0 ? 1 : ceil_div(chunks, stage.tile_features);
      stage.tile_rows = 1;
    } else {
      const bool last = step + 1 == gate.count;
      const WarpTile tile = last ? kLastTile : warp_tile(gate.rows);
      stage.is_linear = true;
      stage.steps = 1;
      stage.tile_rows = smaller(round_up(gate.rows, tile.rows), tile.rows * kGateWarps);
      stage.tile_features = last ? tile.features : tile.features * ceil_div(kGateWarps, stage.tile_rows / tile.rows);
      stage.tiles = ceil_div(gate.steps[step].out, stage.tile_features);
      widest = larger(widest, gate.steps[step].out);
      ++step;
    }
    add_stage(gate, stage, ceil_div(gate.rows, stage.tile_rows));
  }
  gate.pitch = round_up(widest, kChunk);
}

TWN_HD float activate(Activation activation, float x) {
  constexpr float kRootHalf = 0.70710678118654752440f, kRootTwoOverPi = 0.79788456080286535588f;
  switch (activation) {
    case Activation::kGelu: return 0.5f * x * (1.0f + erff(x * kRootHalf));
    case Activation::kGeluTanh: return 0.5f * x * (1.0f + tanhf(kRootTwoOverPi * (x + 0.044715f * x * x * x)));
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;  // NaN stays
    case Activation::kSilu: return x / (1.0f + expf(-x));
    case Activation::kTanh: return tanhf(x);
  }
  return x;
}

TWN_HD float element(const void* values, Number number, int64_t index) {
  if (number == Number::kFloat32) return static_cast<const float*>(values)[index];
  if (number == Number::kFloat16) return widen(static_cast<const Half*>(values)[index]);
  return widen(static_cast<const BFloat*>(values)[index]);
}

TWN_HD void vector_chunk(const void* values, Number number, int chunk, int size, float (&out)[kChunk]) {
  with_number(number, [&](const auto* type) {
    load_chunk<true>(static_cast<decltype(type)>(values) + chunk * kChunk, 1, size, out);
  });
}

// One norm over a row of a buffer; in place too, since each thread meets its own chunks only. `ready` is false where a
// wait ran out: then what is written is NaN, all the way to the scores.
template <typename Team>
TWN_HD void norm_row(Team& team, const GateStep& step, Activation activation, const float* row, float* out, bool ready) {
  const int chunks = chunks_of(step.in);
  const float width = static_cast<float>(step.in);
  const bool centred = step.kind == StepKind::kLayerNorm;
  float mean = 0.0f;
  if (centred) {
    mean = team.sum([&](int thread) {
      float found = 0.0f;
      for (int c = thread; c < chunks; c += Team::kThreads) {
        float x[kChunk];
        load_chunk<false>(row + c * kChunk, 1, chunk_size(c, step.in), x);
        TWN_UNROLL(kChunk)
        for (int i = 0; i < kChunk; ++i) found += x[i];
      }
      return found;
    });
    mean /= width;
  }
  const float squares = team.sum([&](int thread) {
    float found = 0.0f;
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float x[kChunk];
      const int size = chunk_size(c, step.in);
      load_chunk<false>(row + c * kChunk, 1, size, x);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) found = i < size ? fmaf(x[i] - mean, x[i] - mean, found) : found;
    }
    return found;
  });
  const float scale = 1.0f / sqrtf(squares / width + (centred ? kLayerNormEps : kRmsNormEps));
  team.each([&](int thread) {
    for (int c = thread; c < chunks; c += Team::kThreads) {
      float x[kChunk], weight[kChunk], bias[kChunk] = {};
      const int size = chunk_size(c, step.in);
      load_chunk<false>(row + c * kChunk, 1, size, x);
      vector_chunk(step.weight, step.weight_number, c, size, weight);
      if (step.bias != nullptr) vector_chunk(step.bias, step.bias_number, c, size, bias);
      TWN_UNROLL(kChunk)
      for (int i = 0; i < kChunk; ++i) {
        x[i] = (x[i] - mean) * scale * weight[i] + bias[i];
        if (step.activated) x[i] = activate(activation, x[i]);
        if (!ready) x[i] = not_a_number();
      }
      store_chunk(out + c * kChunk, size, x);
    }
  });
}

// A part of a row of the input, its two sides beside each other.
template <typename Team>
TWN_HD void pool_part(Team& team, const Gate& gate, int begin, int end, int64_t row, float* out) {
  const int first_width = gate.inputs[0].width, first_chunks = chunks_of(first_width);
  team.each([&](int thread) {
    for (int c = begin + thread; c < end; c += Team::kThreads) {
      const int side = c >= first_chunks;
      const int chunk = c - side * first_chunks;
      float x[kChunk];
      pool_chunk(gate.inputs[side], row, chunk, x);
      store_chunk(out + side * first_width + chunk * kChunk, chunk_size(chunk, gate.inputs[side].width), x);
    }
  });
}

template <typename Team>
TWN_HD void rows_task(Team& team, const Gate& gate, int stage_index, int tile, int64_t row, bool ready) {
  const GateStage& stage = gate.stages[stage_index];
  float* out = gate.buffers[stage_index & 1] + row * gate.pitch;
  const float* in = gate.buffers[(stage_index + 1) & 1] + row * gate.pitch;  // what the stage before wrote
  if (stage_index == 0) {
    const int chunks = chunks_of(gate.inputs[0].width) + chunks_of(gate.inputs[1].width);
    const int begin = tile * stage.tile_features;
    pool_part(team, gate, begin, smaller(chunks, begin + stage.tile_features), row, out);
    in = out;
  }
  for (int n = 0; n < stage.steps; ++n) {
    team.sync();
    norm_row(team, gate.steps[stage.first + n], gate.activation, in, out, ready);
    in = out;
  }
}

// One lane's share of F x R sums, over F rows of the weight and R rows of the input: chunks lane, lane + 32, ..., and of
// what is no whole chunk, or lies at odd addresses, elements lane, lane + 32, ...
template <int F, int R, typename T>
TWN_HD void lane_sums(const T*, const GateStep& step, const float* in, int64_t pitch, int feature, int row, int rows,
                      int lane, float (&sums)[F * R]) {
  const T* weight = static_cast<const T*>(step.weight) + feature * step.pitch;
  in += row * pitch;
  int weights[F], inputs[R];
  // Beyond the edge the last row is read again: what is summed there is not used.
  TWN_UNROLL(F)
  for (int f = 0; f < F; ++f) weights[f] = static_cast<int>(smaller(f, step.out - 1 - feature) * step.pitch);
  TWN_UNROLL(R)
  for (int r = 0; r < R; ++r) inputs[r] = static_cast<int>(smaller(r, rows - 1 - row) * pitch);
  TWN_UNROLL(F * R)
  for (int i = 0; i < F * R; ++i) sums[i] = 0.0f;
  const int whole = step.is_aligned ? step.in / kChunk * kChunk : 0;
  // One sum must have many loads under way; more sums have them in one round.
  TWN_UNROLL_BY(F * R == 1 ? 4 : 1)
  for (int k = lane * kChunk; k < whole; k += kWarpChunk) {
    float w[F][kChunk], x[kChunk];
    TWN_UNROLL(F)
    for (int f = 0; f < F; ++f) load_aligned<true>(weight + k + weights[f], w[f]);
    TWN_UNROLL(R)
    for (int r = 0; r < R; ++r) {
      load_aligned<false>(in + k + inputs[r], x);
      TWN_UNROLL(F)
      for (int f = 0; f < F; ++f) {
        TWN_UNROLL(kChunk)
        for (int i = 0; i < kChunk; ++i) sums[f * R + r] = fmaf(w[f][i], x[i], sums[f * R + r]);
      }
    }
  }
  for (int k = whole + lane; k < step.in; k += kWarpLanes) {
    TWN_UNROLL(F)
    for (int f = 0; f < F; ++f) {
      const float w = widen(weight[k + weights[f]]);
      TWN_UNROLL(R)
      for (int r = 0; r < R; ++r) sums[f * R + r] = fmaf(w, in[k + inputs[r]], sums[f * R + r]);
    }
  }
}

TWN_HD float finished(const GateStep& step, Activation activation, int feature, float sum) {
  const float y = step.bias == nullptr ? sum : sum + element(step.bias, step.bias_number, feature);
  return step.activated ? activate(activation, y) : y;
}

// The softmax of two logits is the sigmoid of their difference, which stays right where one of them is infinite.
TWN_HD void score_row(const Gate& gate, const GateStep& step, int row, float first_sum, float second_sum) {
  const float first = finished(step, gate.activation, 0, first_sum);
  const float logit = step.out == 1 ? first : finished(step, gate.activation, 1, second_sum) - first;
  const float score = 1.0f / (1.0f + expf(-logit));
  gate.scores[row] = score;
  if (gate.think != nullptr) gate.think[row] = static_cast<double>(score) >= gate.threshold;
}

template <int F, int R, typename Team>
TWN_HD void linear_task(Team& team, const Gate& gate, int stage_index, int tile, int first_row, bool ready) {
  const GateStage& stage = gate.stages[stage_index];
  const GateStep& step = gate.steps[stage.first];
  const float* in = gate.buffers[(stage_index - 1) & 1];
  float* out = gate.buffers[stage_index & 1];
  const int groups = stage.tile_features / F;
  team.units(groups * (stage.tile_rows / R), [&](int unit) {
    const int feature = tile * stage.tile_features + unit % groups * F, row = first_row + unit / groups * R;
    if (feature >= step.out || row >= gate.rows) return;
    float sums[F * R];
    team.template warp_sums<F * R>(sums, [&](int lane, float (&part)[F * R]) {
      with_number(step.weight_number, [&](const auto* type) {
        lane_sums<F, R>(type, step, in, gate.pitch, feature, row, gate.rows, lane, part);
      });
    });
    TWN_UNROLL(F * R)
    for (int i = 0; i < F * R; ++i) sums[i] = ready ? sums[i] : not_a_number();
    team.lanes([&](int lane) {
      if constexpr (F == kLastTile.features && R == kLastTile.rows) {
        if (lane == 0) score_row(gate, step, row, sums[0], sums[1]);
      } else {
        float sum = 0.0f;
        TWN_UNROLL(F * R)
        for (int i = 0; i < F * R; ++i) sum = lane == i ? sums[i] : sum;
        const int f = feature + lane / R, r = row + lane % R;
        if (lane < F * R && f < step.out && r < gate.rows) out[r * gate.pitch + f] = finished(step, gate.activation, f, sum);
      }
    });
  });
}

// Weights depend on nobody: they are on their way while the block waits.
template <typename Team>
TWN_HD void prefetch_tile(Team& team, const GateStage& stage, const GateStep& step, int tile) {
  const int64_t size = step.weight_number == Number::kFloat32 ? 4 : 2;
  const int end = smaller(step.out, (tile + 1) * stage.tile_features);
  for (int feature = tile * stage.tile_features; feature < end; ++feature) {
    team.prefetch(static_cast<const char*>(step.weight) + feature * step.pitch * size, step.in * size);
  }
}

template <int F, int R, typename Team, typename Memory>
TWN_HD void gate_block(Team& team, const Gate& gate, Flags<Memory> flags, uint32_t* report) {
  team.once([&] { flags.begin(); });
  int stage_index = 0;
  while (true) {
    const uint32_t ticket = team.agreed([&] { return flags.take_ticket(); });
    if (ticket >= gate.tasks) break;
    while (ticket >= gate.stages[stage_index].first_task + gate.stages[stage_index].tasks) ++stage_index;
    const GateStage& stage = gate.stages[stage_index];
    const int task = static_cast<int>(ticket - stage.first_task);
    const int tile = task % stage.tiles, row = task / stage.tiles * stage.tile_rows;
    if (stage.is_linear) prefetch_tile(team, stage, gate.steps[stage.first], tile);
    bool ready = true;
    if (stage_index > 0) ready = team.agreed([&] { return flags.wait(done_slot(stage_index - 1)) ? 1u : 0u; }) != 0;
    if (!ready) team.once([&] { *static_cast<volatile uint32_t*>(report) = kGateReport; });
    if (!stage.is_linear) {
      rows_task(team, gate, stage_index, tile, row, ready);
    } else if (stage_index + 1 < gate.stage_count) {
      linear_task<F, R>(team, gate, stage_index, tile, row, ready);
    } else {
      linear_task<kLastTile.features, kLastTile.rows>(team, gate, stage_index, tile, row, ready);
    }
    team.sync();
    team.once([&] {
      if (flags.arrive_last(arrival_slot(stage_index), stage.tasks)) flags.publish(done_slot(stage_index));
    });
  }
  team.once([&] { flags.end(); });
}

}  // namespace twn::small
