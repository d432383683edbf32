// Random gates on real threads, launch after launch on the same words: the same scores as one block alone, and no race.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "small_team.h"

using namespace twn::small;

namespace {

std::mt19937 generator;

int between(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

std::vector<float> numbers(size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> drawn(count);
  for (float& number : drawn) number = normal(generator);
  return drawn;
}

struct Problem {
  Gate gate;
  std::vector<std::vector<float>> memory;

  const float* draw(size_t count) {
    memory.push_back(numbers(count));
    return memory.back().data();
  }
};

Problem problem() {
  Problem made;
  Gate& gate = made.gate;
  gate.rows = between(1, 70);
  int width = between(1, 90);
  gate.inputs[0].width = width;
  gate.inputs[0].count = between(1, 3);
  gate.inputs[0].vector_stride = width;
  gate.inputs[0].row_stride = gate.inputs[0].count * width;
  gate.inputs[0].states = made.draw(gate.rows * gate.inputs[0].row_stride);
  gate.count = between(1, 6);
  for (int i = 0; i < gate.count; ++i) {
    const bool last = i + 1 == gate.count;
    GateStep& step = gate.steps[i];
    step.kind = last ? StepKind::kLinear : static_cast<StepKind>(between(0, 2));
    step.in = width;
    step.out = last ? between(1, 2) : step.kind == StepKind::kLinear ? between(1, 130) : width;
    step.pitch = width;
    step.weight = made.draw(step.kind == StepKind::kLinear ? step.in * step.out : step.in);
    step.bias = step.kind == StepKind::kRmsNorm ? nullptr : made.draw(step.out);
    step.activated = !last && between(0, 1);
    step.is_aligned = rows_are_aligned(step);
    width = step.out;
  }
  plan_gate(gate);
  return made;
}

}  // namespace

int main(int, char** arguments) {
  const int problems = std::atoi(arguments[1]), launches = std::atoi(arguments[2]);
  generator.seed(std::atoi(arguments[3]));
  GateStream shared;  // the words outlive every gate, as they do on a GPU
  for (int p = 0; p < problems; ++p) {
    Problem made = problem();
    std::vector<float> alone(made.gate.rows), scores(made.gate.rows);
    made.gate.scores = alone.data();
    GateStream().launch(made.gate, 1);
    made.gate.scores = scores.data();
    for (int launch = 0; launch < launches; ++launch) {
      std::fill(scores.begin(), scores.end(), -1.0f);
      shared.launch(made.gate, between(1, 6));
      if (std::memcmp(alone.data(), scores.data(), alone.size() * sizeof(float)) != 0 || shared.report != 0) {
        std::printf("problem %d launch %d: other scores than one block's, report %u\n", p, launch, shared.report);
        return 1;
      }
      for (const float score : scores) {
        if (!(score >= 0.0f && score <= 1.0f)) return std::printf("problem %d: a score of %f\n", p, score), 1;
      }
    }
  }
  std::printf("%d gates\n", problems);
  return 0;
}
