// Many launches of the emulated decode kernel on the same words, in every residency and in random order of blocks: built
// with a race detector, it also shows that flags alone order all that blocks pass to each other.
#include <random>

#include "check.h"
#include "decode_emulator.h"

using namespace twn_host;

namespace {

using Layout = DecodeLayout<16, 64, 128>;  // of DecodeForms80

// Takes its time where others wait for it, so that one who does not wait is early.
class SlowHost : public DecodeHost<BFloat16, Layout, false> {
 public:
  using DecodeHost::DecodeHost;
  void make_row(int token) {
    pause();
    DecodeHost::make_row(token);
  }
  void store_shrink(int number, RankTile tile) {
    pause();
    DecodeHost::store_shrink(number, tile);
  }

 private:
  static void pause() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }
};

struct Tensors {
  std::vector<std::vector<uint16_t>> all;
  const uint16_t* draw(std::mt19937& random, size_t count) {
    std::uniform_int_distribution<int> small(-2, 2);  // sums of such are exact in any order
    all.emplace_back(count);
    for (uint16_t& bits : all.back()) bits = BFloat16::narrow(static_cast<float>(small(random)));
    return all.back().data();
  }
};

Group problem(std::mt19937& random, Tensors& tensors, std::vector<int8_t>& routes, std::vector<uint16_t>& y) {
  const auto draw = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  Group group;
  group.tokens = draw(1, 9);
  group.in_features = 8 * draw(1, 40);
  group.count = draw(1, 3);
  group.present = draw(0, 3);
  group.front = draw(0, 1) ? Front::kNorm : Front::kPlain;
  group.norm_weight = tensors.draw(random, group.in_features);
  group.eps = 1.0f;
  group.x = tensors.draw(random, group.tokens * group.in_features);
  group.x_pitch = group.in_features;
  for (int i = 0; i < group.count; ++i) {
    Projection& projection = group.projections[i];
    projection.out_features = draw(1, 200);
    projection.weight = tensors.draw(random, projection.out_features * group.in_features);
    projection.pitch = group.in_features;
    for (Adapter& adapter : projection.adapters) {
      adapter.rank = draw(0, 40);
      adapter.scaling = 0.5f;
      adapter.a = tensors.draw(random, adapter.rank * group.in_features + 8);
      adapter.a_pitch = group.in_features;
      adapter.b = tensors.draw(random, projection.out_features * adapter.rank + 8);
      adapter.b_pitch = adapter.rank;
    }
    group.y_pitch += projection.out_features;
  }
  routes.resize(group.tokens);
  for (int8_t& route : routes) route = static_cast<int8_t>(draw(0, 3));
  group.routes = routes.data();
  y.assign(group.tokens * group.y_pitch, 0x7fff);
  group.y = y.data();
  return group;
}

}  // namespace

int main(int count, char** arguments) {
  CHECK_THAT(count == 3, "usage: rounds seed");
  std::mt19937 random(std::atoi(arguments[2]));
  std::vector<uint32_t> words(1 << 12, 0);
  for (int round = 0; round < std::atoi(arguments[1]); ++round) {
    Tensors tensors;
    std::vector<int8_t> routes;
    std::vector<uint16_t> y;
    const Group group = problem(random, tensors, routes, y);
    std::vector<uint16_t> first;
    for (int launch_number = 0; launch_number < 3; ++launch_number) {
      const int processors = std::uniform_int_distribution<int>(1, 12)(random);
      const DecodePlan plan = decode_plan(group, FormOf<Layout>::shape(), launch_number == 0 ? 1 : processors);
      std::vector<int> order(plan.blocks);
      for (int i = 0; i < plan.blocks; ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      const int resident = std::uniform_int_distribution<int>(1, plan.blocks)(random);
      std::vector<char> workspace(plan.bytes + 256, char(0xff));
      std::fill(y.begin(), y.end(), 0x7fff);
      const bool held = launch<SlowHost>(plan, 2, order, resident, workspace.data(), words.data());
      CHECK_THAT(held, "a wait ran out in round %d", round);
      CHECK_THAT(words[kQueueWord] == 0 && words[kExitWord] == 0, "counters are left at %u and %u", words[kQueueWord], words[kExitWord]);
      for (int slot = kShrinkArrivals; slot < kTileArrivals + plan.tiles; ++slot) {
        CHECK_THAT(words[kFirstFreeWord + slot] == 0, "arrivals at slot %d are left at %u", slot, words[kFirstFreeWord + slot]);
      }
      for (const uint16_t bits : y) CHECK_THAT(!std::isnan(BFloat16::wide(bits)), "an output was not written in round %d", round);
      if (group.front == Front::kPlain && launch_number > 0) CHECK_THAT(y == first, "other values in round %d", round);
      if (launch_number == 0) first = y;
    }
  }
  std::printf("%s rounds\n", arguments[1]);
}
