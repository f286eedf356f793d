// sqrt(log(1 + exp l)) with the exponential always of -|l|.
fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logit_at(base + e);
        let magnitude = abs(logit);
        let tail = select(log_1p(exp(-min(magnitude, 88.0))), 0.0, magnitude > 88.0);
        let softplus = select(0.0, logit, logit > 0.0) + tail;
        let score = sqrt(select(softplus, logit, logit > 20.0));
        // softplus(l) is exp(l) there, and its root lives on where exp(l) has left f32.
        let root = select(exp(0.5 * max(logit, -174.0)), 0.0, logit < -174.0);
        scores[e] = select(score, root, logit < -20.0);
        keys[e] = select(1u, 0u, is_nan(logit) || bitcast<u32>(logit) == 0x7f800000u);
    }
}
