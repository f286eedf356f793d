// The slot of the row's expert. Zero experts follow the slots; `combine` knows whether this device adds them.
fn assigned(row: u32) -> i32 {
    let id = topk_ids[row];
    if id == -1 {
        return -1;
    }
    if id < 0 || id >= i32(SELECTABLE) {
        return -3;
    }
    if id >= i32(NUM_EXPERTS) {
        return i32(NUM_SLOTS) + id - i32(NUM_EXPERTS);
    }
    return slot_of_expert(u32(id), params.first_token + row / ROWS_PER_TOKEN);
}
