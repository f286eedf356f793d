fn order_of(slot: u32) -> i32 {
    return topk_ids[slot];
}
