const RENORMALIZED: bool = true;

// (sum |w|^p)^(1/p); the two usual p without the loss of a general power.
fn renormalize_divisor(weights: ptr<function, array<f32, TOP_K>>, sum: f32) -> f32 {
    var powers = 0.0;
    for (var slot = 0u; slot < TOP_K; slot++) {
        let magnitude = abs((*weights)[slot]);
        if RENORMALIZE_P == 1.0 {
            powers += magnitude;
        } else if RENORMALIZE_P == 2.0 {
            powers += magnitude * magnitude;
        } else if magnitude > 0.0 {
            powers += pow(magnitude, RENORMALIZE_P);
        }
    }
    if RENORMALIZE_P == 1.0 {
        return powers;
    }
    if RENORMALIZE_P == 2.0 {
        return sqrt(powers);
    }
    return select(0.0, pow(max(powers, 1.1754944e-38), 1.0 / RENORMALIZE_P), powers > 0.0);
}
