// g Phi(g). erfc(z) = t exp(P(t) - z^2) with t = 2 / (2 + z), P a polynomial fitted to 6e-9 over the z that
// f32 can show; Phi of a negative g keeps its relative accuracy. Twin: numerics::gelu_erf.
fn gelu_erf(gate: f32) -> f32 {
    let z = min(abs(gate) * 0.70710678, 9.5);
    let t = 2.0 / (2.0 + z);
    var p = -0.150169703;
    p = p * t + 1.02212315;
    p = p * t - 2.92171068;
    p = p * t + 4.44512645;
    p = p * t - 3.7575305;
    p = p * t + 1.80332232;
    p = p * t - 0.772219309;
    p = p * t + 0.243319738;
    p = p * t + 0.351311809;
    p = p * t + 1.00201346;
    p = p * t - 1.26558673;
    let exponent = p - z * z;
    let tail = select(0.5 * t * exp(max(exponent, -87.0)), 0.0, exponent < -87.0);
    let value = gate * select(1.0 - tail, tail, gate < 0.0);
    // -inf times 0 is NaN as in the formula; bits decide.
    let bits = bitcast<u32>(gate);
    let nan = bits == 0xff800000u || (bits & 0x7fffffffu) > 0x7f800000u;
    return bitcast<f32>(select(bitcast<u32>(value), 0x7fc00000u, nan));
}
