// The matrices of the token's adapter for the slot of the row.
fn assigned(row: u32) -> i32 {
    let slot = row_slots[row];
    let adapter = adapter_ids[row / ROWS_PER_TOKEN];
    if slot < 0 || slot >= i32(NUM_SLOTS) || adapter == -1 {
        return -1;
    }
    if adapter < 0 || adapter >= i32(NUM_ADAPTERS) {
        return -2;
    }
    return adapter * i32(NUM_SLOTS) + slot;
}
