fn slot_of_expert(expert: u32, token: u32) -> i32 {
    let slot = i32(expert) - i32(FIRST_EXPERT);
    return select(-1, slot, slot >= 0 && slot < i32(NUM_SLOTS));
}
