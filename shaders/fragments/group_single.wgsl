// Row token * GROUPS + group meets the matrix of its group.
fn slot_of(row: u32) -> i32 {
    return i32(row % GROUPS);
}
