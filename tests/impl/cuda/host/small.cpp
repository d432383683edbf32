// The small kernels' programs as a library: numbers from tensors on a CPU, by the arithmetic of the GPU.
#include "small_team.h"
#include "twn/small/front.h"

using namespace twn::small;

namespace {

Pooled pooled(const void* states, int number, const int64_t* strides, int first, int count, int width) {
  Pooled in;
  in.states = states;
  in.number = static_cast<Number>(number);
  in.row_stride = strides[0];
  in.vector_stride = strides[1];
  in.stride = strides[2];
  in.first = first;
  in.count = count;
  in.width = width;
  return in;
}

template <typename T>
void front_rows(const FrontRows& front, bool one_warp) {
  for (int64_t row = 0; row < front.rows; ++row) {
    if (front.norm_weight == nullptr) {
      for (int chunk = 0; chunk < chunks_of(front.features); ++chunk) gated_chunk<T>(front, row, chunk);
    } else if (one_warp) {
      HostTeam<1> team;
      normalise_row<T>(team, front, row);
    } else {
      HostTeam<8> team;
      normalise_row<T>(team, front, row);
    }
  }
}

}  // namespace

extern "C" {

void pool(const void* states, int number, const int64_t* strides, int rows, int first, int count, int width, int normalize,
          float* out) {
  const Pool pool{pooled(states, number, strides, first, count, width), rows, normalize != 0, out};
  HostTeam<8> team;
  for (int row = 0; row < rows; ++row) pool_row(team, pool, row);
}

void front(const void* x, int64_t pitch, int64_t rows, int features, int number, const void* norm_weight, int is_wide,
           float eps, void* z, int one_warp) {
  const FrontRows front{x, pitch, rows, features, static_cast<Number>(number), norm_weight, is_wide != 0, eps, z};
  number == static_cast<int>(Number::kFloat16) ? front_rows<Half>(front, one_warp) : front_rows<BFloat>(front, one_warp);
}

struct Step {
  const void *weight, *bias;
  int64_t pitch;
  int32_t in, out, kind, weight_number, bias_number, activated;
};

struct Side {
  const void* states;
  int64_t strides[3];
  int32_t number, count, width;
};

// What the launch reported: 0, or the code of a wait that ran out.
uint32_t gate(const Side* sides, int rows, const Step* steps, int count, int activation, double threshold, float* scores,
              uint8_t* think, int blocks, int launches, int deaf) {
  Gate gate;
  for (int i = 0; i < 2; ++i) gate.inputs[i] = pooled(sides[i].states, sides[i].number, sides[i].strides, 0, sides[i].count, sides[i].width);
  gate.rows = rows;
  gate.count = count;
  gate.activation = static_cast<Activation>(activation);
  gate.scores = scores;
  gate.think = think;
  gate.threshold = threshold;
  for (int i = 0; i < count; ++i) {
    const Step& step = steps[i];
    gate.steps[i] = {step.weight, step.bias, step.pitch, step.in, step.out, static_cast<StepKind>(step.kind),
                     static_cast<Number>(step.weight_number), static_cast<Number>(step.bias_number), step.activated != 0, false};
    gate.steps[i].is_aligned = rows_are_aligned(gate.steps[i]);
  }
  plan_gate(gate);
  GateStream stream;
  for (int launch = 0; launch < launches; ++launch) {
    deaf ? stream.launch<DeafMemory>(gate, blocks) : stream.launch(gate, blocks);
  }
  return stream.report;
}

uint16_t half_of(float value) {
  Half half;
  narrow(value, half);
  return half.bits;
}

float of_half(uint16_t bits) { return widen(Half{bits}); }

uint16_t bfloat_of(float value) {
  BFloat number;
  narrow(value, number);
  return number.bits;
}
}
