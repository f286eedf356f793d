// Rows that no expert computes are not defined.
fn counts(row: u32) -> bool {
    let id = topk_ids[row];
    return id >= 0 && id < i32(NUM_EXPERTS);
}
