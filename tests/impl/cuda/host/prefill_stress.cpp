// Launches of random small groups on one stream of words, many blocks at a time: for a race detector.
#include <random>

#include "check.h"
#include "prefill_emulator.h"

using namespace twn_host;

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 10;
  std::mt19937 draw(count > 2 ? std::atoi(arguments[2]) : 1);
  const auto below = [&](int n) { return static_cast<int>(draw() % n); };
  std::vector<uint32_t> words(4096, 0);
  uint32_t report = 0;
  for (int round = 0; round < rounds; ++round) {
    std::vector<std::vector<Piece>> memory;
    const auto numbers = [&](int64_t elements) {
      memory.emplace_back(elements / kPieceElements + 1);
      auto* data = reinterpret_cast<uint16_t*>(memory.back().data());
      for (int64_t i = 0; i < elements; ++i) data[i] = Float16::narrow(static_cast<float>(below(3) - 1));
      return data;
    };
    Group group;
    group.dtype = Dtype::kFloat16;
    group.tokens = 1 + below(400);
    group.in_features = 8 * (1 + below(50));
    group.count = 1 + below(kMaxProjections);
    group.swiglu = group.count == 2 && below(2);
    group.x = numbers(int64_t{1} * group.tokens * group.in_features);
    group.x_pitch = group.in_features;
    group.present = below(8) ? 3 : below(4);
    const int out = 1 + below(70);
    for (int i = 0; i < group.count; ++i) {
      Projection& projection = group.projections[i];
      projection.out_features = group.swiglu ? out : 1 + below(300);
      projection.weight = numbers(int64_t{1} * projection.out_features * group.in_features);
      projection.pitch = group.in_features;
      for (Adapter& adapter : projection.adapters) {
        adapter.rank = below(5) ? 1 + below(80) : 0;
        adapter.a = numbers(int64_t{1} * adapter.rank * group.in_features);
        adapter.a_pitch = group.in_features;
        adapter.b = numbers(int64_t{1} * adapter.rank * projection.out_features);
        adapter.b_pitch = adapter.rank;
        adapter.scaling = 0.5f;
      }
      group.y_pitch += projection.out_features;
    }
    if (group.swiglu) group.y_pitch = out;
    group.y = numbers(group.tokens * group.y_pitch);
    std::vector<int8_t> routes(group.tokens);
    const int run = 1 + below(200);
    for (int row = 0; row < group.tokens; ++row) routes[row] = static_cast<int8_t>(row / run * 7 % 4);
    group.routes = routes.data();
    const int code = launch_prefill(group, below(2) ? kWideN : kNarrowN, 1 + below(9), 1 + below(4), words.data(),
                                    words.size(), &report);
    const char* rule = broken_rule;
    CHECK_THAT(code == 0 && report == 0, "round %d: code %d, report %x, %s", round, code, report, rule ? rule : "");
    CHECK_THAT(words[kQueueWord] == 0 && words[kExitWord] == 0, "round %d leaves words behind", round);
    CHECK_THAT(words[kEpochWord] == static_cast<uint32_t>(round + 1), "round %d is not counted", round);
  }
  std::printf("%d rounds\n", rounds);
}
