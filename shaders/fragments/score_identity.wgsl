fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logit_at(base + e);
        scores[e] = logit;
        keys[e] = select(0u, 1u, is_finite(logit));
    }
}
