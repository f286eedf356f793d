fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logits[base + e];
        scores[e] = sigmoid(logit);
        keys[e] = select(1u, 0u, is_nan(logit));
    }
}
