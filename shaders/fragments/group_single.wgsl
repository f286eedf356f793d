fn slot_of(row: u32) -> i32 {
    return 0;
}
