const NOT_IN_TABLE: u32 = 0xffffffffu;

fn select_experts(token: u32, index: u32) {
    allow_groups(index);
    for (var e = index; e < SELECTABLE; e += WORKGROUP) {
        if is_allowed(e) {
            let key = keys[e];
            var rank = 0u;
            for (var other = 0u; other < SELECTABLE; other++) {
                // Of equal keys the first is the larger; a key of 0 may be that of one that is not allowed.
                let before = keys[other] == key && other < e && (key != 0u || is_allowed(other));
                rank += select(0u, 1u, keys[other] > key || before);
            }
            if rank < TOP_K {
                chosen[rank] = e;
            }
        }
    }
}
