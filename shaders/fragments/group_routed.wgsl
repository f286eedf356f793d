// Slot of the matrix that a row meets; negative: nothing to do here.
fn slot_of(row: u32) -> i32 {
    let slot = row_slots[row];
    return select(slot, -1, slot >= i32(NUM_SLOTS));
}
