// Peers to measure against: wireguard-go behind a TUN device ("tun", the far end of every
// measurement and the kernel-TCP subject), and wireguard-go with gVisor's netstack inside the
// process ("netstack", which is how flyctl reaches its builders). "relay" makes the way between them
// long and lossy (relay.go).
//
// The first two read a WireGuard configuration (UAPI lines) from standard input up to its end. "netstack"
// then does one piece of work against the benchmark's server and prints its figures as JSON.
package main

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"sort"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/tun/netstack"
)

const mtu = 1420

type figures struct {
	Seconds   float64 `json:"seconds"`
	FirstByte float64 `json:"first_byte_s"`
	CPU       float64 `json:"cpu_s"`
	RSS       int64   `json:"rss_bytes"`
	RoundTrip float64 `json:"round_trip_s"`
}

func main() {
	if len(os.Args) < 3 {
		log.Fatal("usage: peers tun NAME | netstack ADDRESS TARGET WORK OCTETS STREAMS | relay ...")
	}
	if os.Args[1] == "relay" {
		serveRelay(os.Args[2:])
		return
	}
	uapi, err := io.ReadAll(os.Stdin)
	if err != nil {
		log.Fatal(err)
	}
	switch os.Args[1] {
	case "tun":
		serveTUN(os.Args[2], string(uapi))
	case "netstack":
		measure(os.Args[2:], string(uapi))
	default:
		log.Fatalf("unknown peer %q", os.Args[1])
	}
}

func bringUp(dev tun.Device, uapi string) *device.Device {
	wg := device.NewDevice(dev, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, ""))
	if err := wg.IpcSet(uapi); err != nil {
		log.Fatal(err)
	}
	if err := wg.Up(); err != nil {
		log.Fatal(err)
	}
	return wg
}

func serveTUN(name, uapi string) {
	dev, err := tun.CreateTUN(name, mtu)
	if err != nil {
		log.Fatal(err)
	}
	wg := bringUp(dev, uapi)
	fmt.Println("up")
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, os.Interrupt)
	<-stop
	wg.Close()
}

func measure(args []string, uapi string) {
	if len(args) != 5 {
		log.Fatal("netstack ADDRESS TARGET WORK OCTETS STREAMS")
	}
	target, work := args[1], args[2]
	octets, err := strconv.ParseInt(args[3], 10, 64)
	if err != nil {
		log.Fatal(err)
	}
	streams, err := strconv.Atoi(args[4])
	if err != nil {
		log.Fatal(err)
	}
	dev, inside, err := netstack.CreateNetTUN([]netip.Addr{netip.MustParseAddr(args[0])}, nil, mtu)
	if err != nil {
		log.Fatal(err)
	}
	began := time.Now()
	wg := bringUp(dev, uapi)
	defer wg.Close()
	ask := func(work byte, octets int64) net.Conn {
		limit, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		stream, err := inside.DialContext(limit, "tcp", target)
		if err != nil {
			log.Fatal(err)
		}
		var header [9]byte
		header[0] = work
		binary.BigEndian.PutUint64(header[1:], uint64(octets))
		if _, err := stream.Write(header[:]); err != nil {
			log.Fatal(err)
		}
		return stream
	}
	var result figures
	probe := ask('d', 1)
	if _, err := io.ReadFull(probe, make([]byte, 1)); err != nil {
		log.Fatal(err)
	}
	result.FirstByte = time.Since(began).Seconds()
	probe.Close()
	before := processor()
	began = time.Now()
	var group sync.WaitGroup
	for range streams {
		group.Add(1)
		go func() {
			defer group.Done()
			one(ask, work, octets/int64(streams), &result)
		}()
	}
	group.Wait()
	result.Seconds = time.Since(began).Seconds()
	result.CPU = processor() - before
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	result.RSS = usage.Maxrss * 1024
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

func one(ask func(byte, int64) net.Conn, work string, octets int64, result *figures) {
	switch work {
	case "up":
		stream := ask('u', octets)
		upload(stream, octets)
		// The clock stops at the server's word that all has arrived, not when the last octet is queued.
		if _, err := io.ReadFull(stream, make([]byte, 8)); err != nil {
			log.Fatal(err)
		}
		stream.Close()
	case "down":
		download(ask('d', octets), octets)
	case "both":
		stream := ask('b', octets)
		done := make(chan struct{})
		go func() { download(stream, octets); close(done) }()
		upload(stream, octets)
		<-done
	case "echo":
		result.RoundTrip = roundTrips(ask('e', 0), int(octets))
	default:
		log.Fatalf("unknown work %q", work)
	}
}

// upload sends and ends its direction.
func upload(stream net.Conn, octets int64) {
	block := make([]byte, 1<<20)
	if _, err := rand.Read(block); err != nil {
		log.Fatal(err)
	}
	for left := octets; left > 0; {
		n, err := stream.Write(block[:min(left, int64(len(block)))])
		if err != nil {
			log.Fatal(err)
		}
		left -= int64(n)
	}
	if half, ok := stream.(interface{ CloseWrite() error }); ok {
		if err := half.CloseWrite(); err != nil {
			log.Fatal(err)
		}
	}
}

func download(stream net.Conn, octets int64) {
	block := make([]byte, 1<<20)
	for left := octets; left > 0; {
		n, err := stream.Read(block[:min(left, int64(len(block)))])
		if err != nil {
			log.Fatal(err)
		}
		left -= int64(n)
	}
}

func roundTrips(stream net.Conn, count int) float64 {
	defer stream.Close()
	block := make([]byte, 64)
	times := make([]float64, count)
	for at := range times {
		began := time.Now()
		if _, err := stream.Write(block); err != nil {
			log.Fatal(err)
		}
		if _, err := io.ReadFull(stream, block); err != nil {
			log.Fatal(err)
		}
		times[at] = time.Since(began).Seconds()
	}
	sort.Float64s(times)
	return times[count/2]
}

func processor() float64 {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		log.Fatal(err)
	}
	return seconds(usage.Utime) + seconds(usage.Stime)
}

func seconds(at syscall.Timeval) float64 {
	return float64(at.Sec) + float64(at.Usec)/1e6
}
