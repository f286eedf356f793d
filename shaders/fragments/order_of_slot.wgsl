fn order_of(slot: u32) -> i32 {
    return row_slots[slot];
}
