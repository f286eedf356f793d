var<workgroup> softmax_max: array<f32, WORKGROUP>;
var<workgroup> softmax_sum: array<f32, WORKGROUP>;
var<workgroup> softmax_state: array<u32, WORKGROUP>;

// State of a logit: 1 if it is a number or -inf, with 2 if it is a number; 4 if it spoils the row.
fn softmax_logit_state(logit: f32) -> u32 {
    let bits = bitcast<u32>(logit);
    if is_nan(logit) || bits == 0x7f800000u {
        return 4u;
    }
    return select(3u, 1u, bits == 0xff800000u);
}

fn softmax_exp(logit: f32, largest: f32) -> f32 {
    let distance = logit - largest;
    // Below exp(-104) every f32 is 0; -inf has no distance.
    let far = distance < -104.0 || bitcast<u32>(logit) == 0xff800000u;
    return select(exp(max(distance, -104.0)), 0.0, far);
}

// A row with NaN or +inf, or without any number, has no finite score.
fn score_row(base: u32, index: u32) {
    var state = 0u;
    var largest = -3.4028234e38;
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        let logit = logit_at(base + e);
        let logit_state = softmax_logit_state(logit);
        state |= logit_state;
        if logit_state == 3u && logit > largest {
            largest = logit;
        }
    }
    softmax_max[index] = largest;
    softmax_state[index] = state;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if index < half {
            softmax_max[index] = max(softmax_max[index], softmax_max[index + half]);
            softmax_state[index] |= softmax_state[index + half];
        }
    }
    workgroupBarrier();
    largest = softmax_max[0];
    var sum = 0.0;
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        scores[e] = softmax_exp(logit_at(base + e), largest);
        sum += scores[e];
    }
    softmax_sum[index] = sum;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if index < half {
            softmax_sum[index] += softmax_sum[index + half];
        }
    }
    workgroupBarrier();
    let valid = (softmax_state[0] & 6u) == 2u;
    for (var e = index; e < ROUTER_OUTPUTS; e += WORKGROUP) {
        scores[e] = select(0.0, scores[e] / softmax_sum[0], valid);
        // Far below the largest, the score is subnormal; 2^64 times it is not.
        let distance = logit_at(base + e) - largest;
        var subnormal = 0u;
        if distance < -80.0 && distance >= -104.0 {
            subnormal = subnormal_bits(exp(distance + 44.3614196) / softmax_sum[0]);
        }
        keys[e] = select(0u, 1u + subnormal, valid);
    }
}
