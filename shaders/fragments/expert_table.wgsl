// One of the expert's slots by the hash of the token; -1: elsewhere, -2: missing.
fn slot_of_expert(expert: u32, token: u32) -> i32 {
    let replica = ((token * 0x9e3779b9u) >> 16u) % REPLICAS;
    let slot = expert_slots[expert * REPLICAS + replica];
    return select(slot, -3, slot < -2 || slot >= i32(NUM_SLOTS));
}
