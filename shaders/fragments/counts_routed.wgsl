// Rows that no expert computes are not defined.
fn counts(row: u32) -> bool {
    let slot = row_slots[row];
    return slot >= 0 && slot < i32(NUM_SLOTS);
}
