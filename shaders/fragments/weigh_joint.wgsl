// log sigmoid without loss at either end.
fn log_sigmoid(logit: f32) -> f32 {
    let magnitude = abs(logit);
    return min(logit, 0.0) - select(log_1p(exp(-min(magnitude, 88.0))), 0.0, magnitude > 88.0);
}

// sigmoid(l) / sum of sigmoid(l) over the chosen and the shared logits, in logarithms. Infinite logits: +inf has
// log 0, -inf weighs nothing; NaN takes no part. Writes the shares; true if a shared logit is NaN.
fn weigh(weights: ptr<function, array<f32, TOP_K>>, base: u32, token: u32) -> bool {
    var largest = -3.4028234e38;
    var spoiled = false;
    var shared_spoiled = false;
    for (var i = 0u; i < TOP_K + NUM_SHARED; i++) {
        var e = SELECTABLE + i - TOP_K;
        if i < TOP_K {
            e = chosen[i];
        }
        let logit = logit_at(base + e);
        if is_nan(logit) {
            spoiled = true;
            shared_spoiled = shared_spoiled || i >= TOP_K;
        } else if bitcast<u32>(logit) != 0xff800000u {
            largest = max(largest, log_sigmoid(logit));
        }
    }
    var sum = 0.0;
    for (var i = 0u; i < TOP_K + NUM_SHARED; i++) {
        var e = SELECTABLE + i - TOP_K;
        if i < TOP_K {
            e = chosen[i];
        }
        sum += joint_part(logit_at(base + e), largest);
    }
    for (var i = 0u; i < TOP_K + NUM_SHARED; i++) {
        var e = SELECTABLE + i - TOP_K;
        if i < TOP_K {
            e = chosen[i];
        }
        let part = joint_part(logit_at(base + e), largest);
        let weight = select(part / sum, 0.0, sum == 0.0) * global_scale();
        if i < TOP_K {
            (*weights)[i] = weight;
        } else {
            var share = weight * ROUTED_SCALING_FACTOR;
            if ROUND_WEIGHTS {
                share = round_model(share);
            }
            let nan = NAN_PROPAGATES && spoiled;
            shared_weights[token * NUM_SHARED + i - TOP_K] = select(bitcast<u32>(share), 0x7fc00000u, nan);
        }
    }
    return shared_spoiled;
}

fn joint_part(logit: f32, largest: f32) -> f32 {
    if is_nan(logit) || bitcast<u32>(logit) == 0xff800000u {
        return 0.0;
    }
    let distance = log_sigmoid(logit) - largest;
    return select(exp(max(distance, -104.0)), 0.0, distance < -104.0);
}
