const NOT_IN_TABLE: u32 = 0xffffffffu;

fn select_experts(token: u32, index: u32) {
    let token_id = token_ids[token];
    for (var slot = index; slot < TOP_K; slot += WORKGROUP) {
        if token_id < VOCAB_SIZE {
            chosen[slot] = u32(tid2eid[token_id * TOP_K + slot]);
        } else {
            chosen[slot] = NOT_IN_TABLE;
        }
    }
}
