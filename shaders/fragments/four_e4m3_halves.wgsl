// Four E4M3 codes of a word as binary16, which has the same fields with a bias larger by 8: exact where the device
// unpacks each binary16 exactly, in few instructions. NaN reads as 480: `e4m3_nans` tells.
const E4M3_FACTOR: f32 = 256.0;

fn four_e4m3(word: u32) -> vec4<f32> {
    let even = word & 0x00ff00ffu;
    let odd = (word >> 8u) & 0x00ff00ffu;
    let xz = unpack2x16float(((even & 0x00800080u) << 8u) | ((even & 0x007f007fu) << 7u));
    let yw = unpack2x16float(((odd & 0x00800080u) << 8u) | ((odd & 0x007f007fu) << 7u));
    return vec4<f32>(xz.x, yw.x, xz.y, yw.y);
}

// Not zero if a code is NaN.
fn e4m3_nans(word: u32) -> u32 {
    return ((word & 0x7f7f7f7fu) + 0x01010101u) & 0x80808080u;
}
