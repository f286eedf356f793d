// log(1 + e) for 0 <= e <= 1 as 2 atanh(e / (2 + e)): no digit is lost for small e, where 1 + e rounds.
fn log_1p(e: f32) -> f32 {
    let s = e / (2.0 + e);
    let s2 = s * s;
    var series = 1.0 / 15.0;
    series = series * s2 + 1.0 / 13.0;
    series = series * s2 + 1.0 / 11.0;
    series = series * s2 + 1.0 / 9.0;
    series = series * s2 + 1.0 / 7.0;
    series = series * s2 + 0.2;
    series = series * s2 + 1.0 / 3.0;
    series = series * s2 + 1.0;
    return 2.0 * s * series;
}

// sqrt(log(1 + exp l)) with the exponential always of -|l|.
fn score_row(base: u32, index: u32) {
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logits[base + e];
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
