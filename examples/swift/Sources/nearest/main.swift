// Prints which label is nearest to an image, with an encoder that `mlx-aimv2 export` wrote on a Mac.
//
//   nearest encoder.mlxfn photo.jpg labels.json
//
// Not compiled and not run by us, who have no Mac: its syntax is parsed by a test, and the names are those of mlx-swift
// at commit 09051ed (Source/MLX/Export.swift). encoder.mlxfn was exported with --input uint8, and encoder.json lies
// beside it. labels.json holds an object, {"a cat": [0.1, …], …}: each label's vector as Python's encode_text gives it. A
// function with a head inside knows its labels and takes no labels.json.
//
// Core Graphics does not resize as Pillow does, with which the checkpoints are measured. How far another resize moves
// the vector is in docs/apps.md.

import CoreGraphics
import Foundation
import ImageIO
import MLX

struct Failure: Error, CustomStringConvertible {
    let description: String
}

/// What encoder.json says.
struct Description: Decodable {
    struct Input: Decodable {
        let dtype: String
        let shape: [Int]
    }
    struct Output: Decodable {
        let name: String
    }
    let input: Input
    let outputs: [Output]
    let labels: [String]?
}

/// The RGB levels of an image, height x width x 3, its middle scaled to fill them.
func levels(of url: URL, height: Int, width: Int) throws -> [UInt8] {
    guard let source = CGImageSourceCreateWithURL(url as CFURL, nil) else {
        throw Failure(description: "\(url.path) cannot be read")
    }
    // A thumbnail is turned as the photograph's EXIF data say.
    let options: [CFString: Any] = [
        kCGImageSourceCreateThumbnailFromImageAlways: true,
        kCGImageSourceCreateThumbnailWithTransform: true,
    ]
    guard let image = CGImageSourceCreateThumbnailAtIndex(source, 0, options as CFDictionary) else {
        throw Failure(description: "\(url.path) is no image")
    }
    guard
        let context = CGContext(
            data: nil, width: width, height: height, bitsPerComponent: 8, bytesPerRow: 4 * width,
            space: CGColorSpace(name: CGColorSpace.sRGB)!, bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue),
        let data = context.data
    else {
        throw Failure(description: "no memory for \(width) x \(height) pixels")
    }
    context.interpolationQuality = .high
    // Transparent images lie on white, as in the Python package.
    context.setFillColor(CGColor(red: 1, green: 1, blue: 1, alpha: 1))
    context.fill(CGRect(x: 0, y: 0, width: width, height: height))
    let scale = max(Double(width) / Double(image.width), Double(height) / Double(image.height))
    let size = CGSize(width: scale * Double(image.width), height: scale * Double(image.height))
    let origin = CGPoint(x: (Double(width) - size.width) / 2, y: (Double(height) - size.height) / 2)
    context.draw(image, in: CGRect(origin: origin, size: size))
    let pixels = data.assumingMemoryBound(to: UInt8.self)
    return (0..<height * width).flatMap { [pixels[4 * $0], pixels[4 * $0 + 1], pixels[4 * $0 + 2]] }
}

func cosine(_ one: [Float], _ other: [Float]) -> Float {
    func product(_ a: [Float], _ b: [Float]) -> Float {
        zip(a, b).reduce(0) { $0 + $1.0 * $1.1 }
    }
    return product(one, other) / (product(one, one) * product(other, other)).squareRoot()
}

func run(_ arguments: [String]) throws {
    guard arguments.count >= 3 else {
        throw Failure(description: "usage: nearest encoder.mlxfn photo.jpg [labels.json]")
    }
    let file = URL(fileURLWithPath: arguments[1])
    let json = try Data(contentsOf: file.deletingPathExtension().appendingPathExtension("json"))
    let about = try JSONDecoder().decode(Description.self, from: json)
    guard about.input.dtype == "uint8" else {
        throw Failure(description: "\(file.lastPathComponent) takes \(about.input.dtype): export it with --input uint8")
    }
    let (height, width) = (about.input.shape[0], about.input.shape[1])
    let bytes = try levels(of: URL(fileURLWithPath: arguments[2]), height: height, width: width)

    let encode = try importFunction(from: file)
    let found = try encode(MLXArray(bytes, [1, height, width, 3]))[0].asType(.float32).asArray(Float.self)

    var scores: [(label: String, score: Float)]
    if about.outputs[0].name == "probabilities" {
        scores = zip(about.labels ?? [], found).map { (label: $0, score: $1) }
    } else {
        guard arguments.count == 4 else {
            throw Failure(description: "give labels.json, the vectors of your labels")
        }
        let vectors = try Data(contentsOf: URL(fileURLWithPath: arguments[3]))
        let labels = try JSONDecoder().decode([String: [Float]].self, from: vectors)
        scores = labels.map { (label: $0.key, score: cosine($0.value, found)) }
    }
    guard let best = scores.max(by: { $0.score < $1.score }) else {
        throw Failure(description: "there are no labels")
    }
    print("\(best.label)\t\(best.score)")
}

do {
    try run(CommandLine.arguments)
} catch {
    FileHandle.standardError.write(Data("nearest: \(error)\n".utf8))
    exit(2)
}
