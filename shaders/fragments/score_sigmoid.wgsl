fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logit_at(base + e);
        scores[e] = sigmoid(logit);
        // Below -87 the score is subnormal, exp(l); exp(l + 64 ln 2) is not.
        var subnormal = 0u;
        if logit < -87.0 && logit >= -88.72 {
            subnormal = subnormal_bits(exp(logit + 44.3614196));
        }
        keys[e] = select(1u + subnormal, 0u, is_nan(logit));
    }
}
