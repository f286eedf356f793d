const NOT_IN_TABLE: u32 = 0xffffffffu;

fn select_experts(token: u32, index: u32) {
    allow_groups(index);
    for (var e = index; e < SELECTABLE; e += WORKGROUP) {
        if is_allowed(e) {
            var rank = 0u;
            for (var other = 0u; other < SELECTABLE; other++) {
                if is_allowed(other) && (keys[other] > keys[e] || (keys[other] == keys[e] && other < e)) {
                    rank++;
                }
            }
            if rank < TOP_K {
                chosen[rank] = e;
            }
        }
    }
}
