// tanh with a relative error of some ulp everywhere; WGSL's own may err by 1e-5. Keeps NaN.
fn accurate_tanh(x: f32) -> f32 {
    let magnitude = abs(x);
    // Near 0 the series x - x^3 / 3 + 2 x^5 / 15 - ..., else 1 - 2 / (exp(2 |x|) + 1).
    let square = x * x;
    var series = 929569.0 / 638512875.0 * -1.0;
    series = series * square + 21844.0 / 6081075.0;
    series = series * square - 1382.0 / 155925.0;
    series = series * square + 62.0 / 2835.0;
    series = series * square - 17.0 / 315.0;
    series = series * square + 2.0 / 15.0;
    series = series * square - 1.0 / 3.0;
    let near = x + x * square * series;
    let far = 1.0 - 2.0 / (exp(min(2.0 * magnitude, 88.0)) + 1.0);
    let signed_far = bitcast<f32>(bitcast<u32>(far) | (bitcast<u32>(x) & 0x80000000u));
    return keep_nan(x, select(signed_far, near, magnitude < 0.5));
}
