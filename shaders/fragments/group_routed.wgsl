// Slot of the expert that row token * TOP_K + slot is routed to; negative: nothing to do here.
fn slot_of(row: u32) -> i32 {
    let id = topk_ids[row];
    if id < 0 || id >= i32(NUM_EXPERTS) {
        return -1;
    }
    return expert_slots[id];
}
