// What one block of the decode kernel does, from its first load to its last flag: the same code on a GPU and in the tests.
//
// `Ops` gives the instructions: of the device in device.cuh (all threads of the block call every function), of the host in
// the tests (plain loops). Order matters: weights are asked for before anything is waited for; S is needed last.
#pragma once

#include "twn/decode/plan.h"

namespace twn {

template <typename Ops>
TWN_HD void wait_for_rows(Ops& ops, const DecodePlan& plan) {
  if (plan.front_tasks() != 0) ops.wait(kRowTags, kRowTags + plan.front_tasks());
}

template <typename Ops>
TWN_HD void run_shrink_task(Ops& ops, const DecodePlan& plan, int number) {
  const ShrinkTask task = plan.shrink_task(number);
  const RankTile tile = plan.rank_tile(task.tile);
  if (!ops.uses(tile.adapter)) return;  // known to every block alike, so nobody counts or waits
  wait_for_rows(ops, plan);
  ops.shrink(task, tile);
  if (plan.slices > 1) {
    ops.store_shrink_slice(task);
    if (!ops.arrive_last(kShrinkArrivals + task.tile, plan.slices)) return;
  }
  ops.store_shrink(task.tile, tile);
  ops.publish(kShrinkTags + task.tile);
}

template <typename Ops>
TWN_HD void run_tasks(Ops& ops, const DecodePlan& plan) {
  const uint32_t tasks = plan.tasks(), rows = plan.front_tasks();
  for (uint32_t ticket = ops.take_ticket(); ticket < tasks; ticket = ops.take_ticket()) {
    if (ticket < rows) {
      ops.make_row(ticket);
      ops.publish(kRowTags + ticket);
    } else {
      run_shrink_task(ops, plan, ticket - rows);
    }
  }
}

// Adds the adapters' terms to a finished tile and writes it.
template <typename Ops>
TWN_HD void finish_tile(Ops& ops, const DecodePlan& plan, int tile) {
  const TilePlace place = plan.place_of(tile);
  for (int adapter = 0; adapter < kAdapters; ++adapter) {
    if (!ops.uses(adapter)) continue;
    for (int p = place.projection; p <= place.projection + plan.group.swiglu; ++p) {
      ops.wait(kShrinkTags + plan.rank_tile_begin(p, adapter), kShrinkTags + plan.rank_tile_end(p, adapter));
    }
    ops.expand(place, adapter);
  }
  ops.store_tile(place);
}

// The units that this block has of one tile; the rest of the tile may lie with other blocks.
template <typename Ops>
TWN_HD void run_tile(Ops& ops, const DecodePlan& plan, int block, int tile, int units) {
  ops.clear();
  for (int adapter = 0; adapter < kAdapters; ++adapter) {
    if (ops.uses(adapter)) ops.ask_for_rows_of_b(plan.place_of(tile), adapter);
  }
  for (int i = 0; i < units; ++i) ops.multiply_unit();
  ops.join_chunk_groups();
  const TileParts parts = plan.parts_of(tile);
  if (parts.count > 1) {
    ops.store_partial(plan.partial_slot(block, tile));
    if (!ops.arrive_last(kTileArrivals + tile, parts.count)) return;
    ops.sum_partials(parts, tile);
  }
  finish_tile(ops, plan, tile);
}

template <typename Ops>
TWN_HD void decode_program(Ops& ops, const DecodePlan& plan, int block) {
  const UnitRange range = plan.units_of(block);
  ops.load_weights_ahead(range);
  ops.wait_for_previous_kernels();
  ops.begin();
  run_tasks(ops, plan);
  wait_for_rows(ops, plan);
  ops.load_inputs_ahead();
  for (int unit = range.begin; unit < range.end;) {
    const int tile = unit / plan.unit_steps;
    const int end = smaller(range.end, (tile + 1) * plan.unit_steps);
    run_tile(ops, plan, block, tile, end - unit);
    unit = end;
  }
  ops.end();
}

}  // namespace twn
