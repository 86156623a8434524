// swift-tools-version: 6.0
// Not compiled by us, who have no Mac. mlx-swift's Metal kernels are built by Xcode, not by `swift build`:
//   xcodebuild build -scheme nearest -destination 'platform=macOS'
import PackageDescription

let package = Package(
    name: "nearest",
    platforms: [.macOS(.v14)],
    dependencies: [.package(url: "https://github.com/ml-explore/mlx-swift", from: "0.31.6")],
    targets: [.executableTarget(name: "nearest", dependencies: [.product(name: "MLX", package: "mlx-swift")])]
)
